"""Operations on tensors that belong to no method, and what the machine does meanwhile."""
