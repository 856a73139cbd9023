//! Less of what a cache holds, without the teacher: a smaller k, a higher cutoff, fewer bits. Nothing that was not kept comes back,
//! and whoever asks for it is told so.

use crate::{Error, Result, Selection, SoftTargets, Storage, Target, Values};

impl Storage {
    /// Whether rows stored so can be stored as `narrower` says. Errors: `Raise`, with both sides.
    pub fn check_narrows_to(&self, narrower: &Storage) -> Result<()> {
        self.selection.check_narrows_to(&narrower.selection)?;
        let raise = |what, has: String, asked: String| Err(Error::Raise { what, has, asked });
        match (self.values, narrower.values) {
            (Values::LogitBf16, _) => Ok(()),
            (Values::Logprob, Values::LogitBf16) => raise("values", "log-probabilities".into(), "logits".into()),
            (Values::Logprob, Values::Logprob) if narrower.mantissa_bits > self.mantissa_bits => {
                raise("mantissa_bits", self.mantissa_bits.to_string(), narrower.mantissa_bits.to_string())
            }
            _ => Ok(()),
        }
    }
}

impl SoftTargets {
    /// What `selection` keeps of these targets, from a cache whose selection it narrows
    /// ([`Selection::check_narrows_to`]).
    ///
    /// The tail of a shortened list is the sum of the stored tail and the stored probabilities that were dropped: never a difference.
    pub fn narrowed(&self, selection: &Selection) -> SoftTargets {
        let mut out = SoftTargets::with_capacity(self.len(), usize::from(selection.head()));
        let draws = selection.draws().is_some();
        for i in 0..self.len() {
            let target = self.position(i);
            let kept = selection.kept(target.logprobs);
            let dropped = target.logprobs[kept..].iter().map(|&l| f64::from(l).exp()).sum::<f64>();
            let tail_logprob = match dropped {
                0.0 => target.tail_logprob,
                dropped => ((dropped + f64::from(target.tail_logprob).exp()).ln() as f32).min(0.0),
            };
            let (sample_ids, sample_counts) = if draws { (target.sample_ids, target.sample_counts) } else { Default::default() };
            out.push_target(&Target {
                ids: &target.ids[..kept],
                logprobs: &target.logprobs[..kept],
                tail_logprob,
                sample_ids,
                sample_counts,
                logits: target.logits.get(..kept).unwrap_or_default(),
                ..target
            });
        }
        out
    }

    /// As [`narrowed`](Self::narrowed), of targets that were kept as `own` says.
    ///
    /// A rule chose from unrounded values. It is not asked again of what it kept: rounded, an entry at its border may lie beyond it.
    pub fn narrowed_from(&self, own: &Selection, to: &Selection) -> SoftTargets {
        match (own, to) {
            (own, to) if own == to => self.clone(),
            (Selection::Cutoff { rule, .. }, Selection::Cutoff { k, rule: same }) if rule == same => {
                self.narrowed(&Selection::TopK { k: *k })
            }
            _ => self.narrowed(to),
        }
    }

    /// The same targets with log-probabilities alone where logits were kept beside them.
    pub fn without_logits(&self) -> SoftTargets {
        let mut out = SoftTargets::with_capacity(self.len(), 0);
        for i in 0..self.len() {
            out.push_target(&Target { logits: &[], logsumexp: None, ..self.position(i) });
        }
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::{Cutoff, Preset};

    #[test]
    fn dropped_entries_go_into_the_tail() {
        let p = [0.5f64, 0.25, 0.125, 0.0625, 0.0625];
        let ln: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let mut targets = SoftTargets::default();
        targets.push(&[9, 4, 7, 1], &ln[..4], ln[4]);
        for (selection, kept) in [
            (Selection::TopK { k: 2 }, 2),
            (Selection::TopK { k: 4 }, 4),
            (Selection::Cutoff { k: 4, rule: Cutoff::MinProb(0.1) }, 3),
            (Selection::Cutoff { k: 4, rule: Cutoff::MinMass(0.4) }, 1),
        ] {
            let narrow = targets.narrowed(&selection);
            let target = narrow.position(0);
            assert_eq!((target.ids, target.logprobs), (&[9, 4, 7, 1][..kept], &ln[..kept]), "{selection}");
            let rest: f64 = p[kept..].iter().sum();
            // One f32 rounding of the logarithm.
            assert!((f64::from(target.tail_logprob) - rest.ln()).abs() < 2e-7, "{selection}: {}", target.tail_logprob);
        }
    }

    #[test]
    fn a_rule_is_not_asked_again_of_what_it_kept() {
        let cutoff = |k, p| Selection::Cutoff { k, rule: Cutoff::MinProb(p) };
        // With 5 mantissa bits a probability just above 1e-4, ln -9.21, is stored as -9.25.
        let mut targets = SoftTargets::default();
        targets.push(&[9, 4, 7], &[-0.25, -1.5, -9.25], -9.5);
        let kept = |own: Selection, to: Selection| targets.narrowed_from(&own, &to).position(0).ids.len();
        assert_eq!(kept(cutoff(8, 1e-4), cutoff(8, 1e-4)), 3, "its own selection");
        assert_eq!(kept(cutoff(8, 1e-4), cutoff(3, 1e-4)), 3, "its own rule");
        assert_eq!(kept(cutoff(8, 1e-4), cutoff(2, 1e-4)), 2, "its own rule, fewer entries");
        assert_eq!(kept(cutoff(8, 5e-5), cutoff(8, 1e-4)), 2, "another rule");
        assert_eq!(kept(Selection::TopK { k: 3 }, cutoff(3, 1e-4)), 2, "a rule where there was none");
        let mass = |k| Selection::Cutoff { k, rule: Cutoff::MinMass(0.9) };
        assert_eq!((kept(mass(8), mass(8)), kept(mass(8), mass(2)), kept(mass(8), mass(1))), (3, 2, 1));
        assert_eq!(targets.narrowed_from(&mass(8), &mass(8)), targets);
    }

    #[test]
    fn storage_only_narrows() {
        let [exact, standard, compact, small, sampled] = Preset::ALL.map(|preset| preset.storage());
        for narrower in [standard, compact, small] {
            assert!(exact.check_narrows_to(&narrower).is_ok());
            assert!(narrower.check_narrows_to(&exact).is_err());
        }
        assert!(standard.check_narrows_to(&compact).is_ok() && compact.check_narrows_to(&standard).is_err());
        let error = compact.check_narrows_to(&Storage { mantissa_bits: 7, ..compact }).unwrap_err().to_string();
        assert!(error.starts_with("mantissa_bits: the cache has 5, which cannot become 7"), "{error}");
        assert!(sampled.check_narrows_to(&standard).is_err() && standard.check_narrows_to(&sampled).is_err());
        assert!(sampled.check_narrows_to(&Storage { zstd_level: 19, ..sampled }).is_ok());
    }
}
