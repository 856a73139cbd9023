//! What was measured, as tables for people and as JSON.

use crate::reading::{Cold, Spread};
use serde::Serialize;
use serde_json::json;
use std::fmt;

/// Everything of one run.
#[derive(Default)]
pub struct Report {
    /// One storage each.
    pub storages: Vec<Figures>,
    /// Memory of open shards.
    pub open_shards: Option<OpenShards>,
}

/// Figures of one storage. Bytes are per scored position.
pub struct Figures {
    pub name: &'static str,
    pub selection: String,
    pub rows: u64,
    pub scored: u64,
    pub entries: f64,
    pub bytes: f64,
    pub columns: Vec<(String, f64)>,
    pub other: f64,
    pub codec_kl: Option<(f64, f64)>,
    /// Positions a second.
    pub write_cpu: f64,
    pub write_wall: f64,
    pub read: Spread,
    pub arrow: Spread,
    /// CPU microseconds of opening the cache, and of reading its manifest alone.
    pub open: f64,
    pub manifest: f64,
    pub cold: Result<Cold, String>,
}

/// Memory of a process that holds shards open.
#[derive(Serialize)]
pub struct OpenShards {
    pub shards: u64,
    pub rows: u64,
    pub before: f64,
    pub after: f64,
    pub open: f64,
}

impl Serialize for Report {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let spread = |s: &Spread| json!({ "p10": s.p10, "p50": s.p50, "p90": s.p90 });
        let storages = self.storages.iter().map(|f| {
            let cold = match &f.cold {
                Ok(cold) => json!({ "fetched": cold.fetched, "needed": cold.needed, "blocks": cold.blocks }),
                Err(reason) => json!({ "missing": reason }),
            };
            json!({
                "name": f.name, "selection": f.selection, "rows": f.rows, "scored": f.scored, "entries": f.entries,
                "bytes": f.bytes, "columns": f.columns.iter().map(|(name, bytes)| (name.clone(), json!(bytes))).collect::<serde_json::Map<_, _>>(), "other": f.other,
                "kl_mean": f.codec_kl.map(|kl| kl.0), "kl_max": f.codec_kl.map(|kl| kl.1),
                "write_per_cpu_s": f.write_cpu, "write_per_wall_s": f.write_wall,
                "read_us": spread(&f.read), "arrow_us": spread(&f.arrow),
                "open_us": f.open, "manifest_us": f.manifest, "cold": cold,
            })
        });
        json!({ "storages": storages.collect::<Vec<_>>(), "open_shards": self.open_shards }).serialize(serializer)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.storages.first() else { return self.shards(f) };
        writeln!(
            f,
            "{} rows, {} positions a storage; speeds are CPU time; cold = fetched / needed bytes",
            first.rows, first.scored
        )?;
        writeln!(
            f,
            "{:<20} {:>8} {:>7} {:>8} {:>8} {:>9} {:>9} {:>18} {:>18} {:>6} {:>8} {:>6}",
            "storage",
            "B/pos",
            "entries",
            "KL mean",
            "KL max",
            "write/s",
            "(wall)",
            "read us p50 10-90",
            "arrow us p50 10-90",
            "ratio",
            "open us",
            "cold"
        )?;
        for s in &self.storages {
            let kl = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1e}"));
            let spread = |s: &Spread| format!("{:.0} {:.0}-{:.0}", s.p50, s.p10, s.p90);
            let cold = s.cold.as_ref().map_or("-".into(), |cold| format!("{:.2}", cold.fetched / cold.needed));
            writeln!(
                f,
                "{:<20} {:>8.2} {:>7.1} {:>8} {:>8} {:>8.0}k {:>8.0}k {:>18} {:>18} {:>6.2} {:>8.0} {:>6}",
                s.name,
                s.bytes,
                s.entries,
                kl(s.codec_kl.map(|kl| kl.0)),
                kl(s.codec_kl.map(|kl| kl.1)),
                s.write_cpu / 1e3,
                s.write_wall / 1e3,
                spread(&s.read),
                spread(&s.arrow),
                s.arrow.p50 / s.read.p50,
                s.open,
                cold
            )?;
        }
        writeln!(f, "\nbytes a position by column")?;
        for s in &self.storages {
            let columns = s.columns.iter().filter(|(_, bytes)| *bytes >= 0.005).map(|(name, bytes)| format!("{name} {bytes:.2}"));
            writeln!(f, "{:<20} {}  rest {:.2}", s.name, columns.collect::<Vec<_>>().join("  "), s.other)?;
        }
        writeln!(f, "\na cold read: bytes fetched / needed / needed in 4 KiB blocks; opening: whole, its manifest alone (us)")?;
        for s in &self.storages {
            match &s.cold {
                Ok(cold) => write!(f, "{:<20} {:>8.0} {:>8.0} {:>8.0}", s.name, cold.fetched, cold.needed, cold.blocks)?,
                Err(reason) => write!(f, "{:<20} {reason}", s.name)?,
            }
            writeln!(f, "   {:.0} {:.0}", s.open, s.manifest)?;
        }
        self.shards(f)
    }
}

impl Report {
    fn shards(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(open) = &self.open_shards else { return Ok(()) };
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        writeln!(
            f,
            "\n{} open shards of {} rows: {:.0} MiB resident ({:.0} before), {:.0} us of CPU to open one",
            open.shards,
            open.rows,
            mib(open.after),
            mib(open.before),
            open.open
        )
    }
}
