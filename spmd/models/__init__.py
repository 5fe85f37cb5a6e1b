"""Models as Flax NNX modules that name logical dims only: no mesh axis, no strategy."""
