"""How gradients are computed: directly, accumulated, per example, or through a pipeline."""
