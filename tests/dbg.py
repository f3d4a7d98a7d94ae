import torch, tempfile,sys
from muon_dist import MuonDist
from tests import models
from tests.ranks import run_ranks
from tests.test_checkpoints import *
def g(folder):
    model, optimizer = make("fsdp2")
    train(model, optimizer, "fsdp2", range(2))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    again, other = make("fsdp2")
    with torch.no_grad():
        for p in again.parameters(): p.zero_()
    state = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"])
    out=[]
    def cmp(tag):
      for (n,p),(m,q) in zip(model.named_parameters(), again.named_parameters()):
        if not torch.equal(models.whole(p),models.whole(q)): out.append((tag,n,(models.whole(p)-models.whole(q)).abs().max()))
        for k in optimizer.state[p]:
            a,b=optimizer.state[p][k],other.state[q][k]
            if not torch.equal(models.whole(a),models.whole(b)): out.append((tag,n,k,models.whole(a),models.whole(b)))
    cmp(0)
    for s in (2,3):
      for m,o in ((model,optimizer),(again,other)): train(m,o,"fsdp2",range(s,s+1))
      out.append([torch.equal(models.whole(p.grad),models.whole(q.grad)) for p,q in zip(model.parameters(),again.parameters())])
      cmp(s)
    return out
if __name__=="__main__":
  with tempfile.TemporaryDirectory() as d:
    for x in run_ranks(4,g,d)[0]: print(x)
