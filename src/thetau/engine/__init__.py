"""The only loop over tensors: what parts promise (`types`), reading (`window`), passes (`merge`), running (`executor`), writing (`save`), the plan."""
