//! Judges, asked over real HTTP of a server in this process, and their figures against those of NumPy (`scripts/make_judge_fixtures.py`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod alpaca_eval;
mod made;
mod mt_bench;
mod server;
mod trouble;
