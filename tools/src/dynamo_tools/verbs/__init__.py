"""Commands of ``dyn``, one module each: ``add`` declares the arguments, ``main`` runs and returns the exit status."""
