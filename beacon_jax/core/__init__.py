"""Windows, memory and the loop over them: everything Activation Beacon adds."""
