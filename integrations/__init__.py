"""MuonDist inside host frameworks. Installed as `muon_dist.integrations`; each host is imported only by its own room."""
