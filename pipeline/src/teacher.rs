//! The teacher: packs in, soft targets out.
