//! Divergences on kept ids and tail, cross entropy, and the fused head.
