//! Blocks with a forward and a backward, each beside its CPU definition.
