"""From a policy and datasets to a trained adapter: arguments, callbacks, checkpoints, samples."""
