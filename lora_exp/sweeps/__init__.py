"""Many runs: which trial is which, which is best, and how sure that is."""
