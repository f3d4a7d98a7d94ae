import torch
from muon_dist import MuonDist
from tests import models
from tests.ranks import run_ranks
from tests.reference import ReferenceMuon
def f(placement, shapes, dtype):
    model = models.place(models.make_bank(models.ODD if shapes == "odd" else models.EVEN, dtype), placement)
    parameters = models.whole_parameters(model)
    optimizer = MuonDist(model.named_parameters(), lr=1.0, weight_decay=0.0, bucket_mb=.008)
    reference = ReferenceMuon(parameters, models.muon_names(parameters), lr=1.0, weight_decay=0.0)
    out=[]
    for seed in range(2):
        models.backward(model, seed, placement)
        before = models.whole_parameters(model)
        reference.parameters = {name: p.clone() for name, p in before.items()}
        reference.step(models.whole_gradients(model))
        optimizer.step()
        errors = models.relative_errors(before, models.whole_parameters(model), reference.parameters)
        out.append({k:v for k,v in errors.items() if v>1e-10})
    d=optimizer._domains
    out.append([(b,[d[0].plan.matrices[i].name for i in bb],[d[0].plan.owners[i] for i in bb]) for b,bb in enumerate(d[0].plan.buckets)])
    return out
if __name__=="__main__":
    import sys
    for r in run_ranks(int(sys.argv[2]), f, sys.argv[1], sys.argv[3], torch.float64)[:1]:
        for x in r: print(x)
