//! What a count of wins and losses says: an interval of the share, and how surprising it is of a fair coin.

/// The normal distribution's 97.5 % quantile.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's 95 % interval of the share `wins / (wins + losses)` (Wilson 1927); `None` of nothing.
pub fn wilson(wins: u64, losses: u64) -> Option<[f64; 2]> {
    let n = (wins + losses) as f64;
    if n == 0.0 {
        return None;
    }
    let share = wins as f64 / n;
    let centre = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    Some([((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0)])
}

/// The exact two-sided p of `wins` against `losses` under a fair coin: twice the smaller tail of Binomial(n, ½), at most 1 (the sign test).
pub fn sign_test(wins: u64, losses: u64) -> f64 {
    let n = wins + losses;
    let mut term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for i in 0..=wins.min(losses) {
        tail += term.exp();
        // C(n, i + 1) = C(n, i) · (n − i) / (i + 1)
        term += ((n - i) as f64).ln() - ((i + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// By Python: `fractions.Fraction` over `math.comb`, and the interval in `decimal` of 50 digits.
    /// (wins, losses, low, high, p)
    const EXACT: [(u64, u64, f64, f64, f64); 9] = [
        (420, 385, 0.4872106047713301, 0.556061163284465, 0.2307627049748705),
        (531, 273, 0.6270202943763397, 0.6923493012082128, 6.080760063850202e-20),
        (67, 62, 0.43385556173626927, 0.6037832902033866, 0.724854366971759),
        (46, 34, 0.4656928984656886, 0.6774343821039823, 0.2185180394787037),
        (100, 88, 0.46066388758841614, 0.6018877635185319, 0.42247890957583895),
        (3, 0, 0.4385029682449545, 1.0, 0.25),
        (0, 9, 0.0, 0.2991450484195441, 0.00390625),
        (431, 374, 0.5008639514934311, 0.5696072136260065, 0.048343881069146104),
        (10, 990, 0.005440754445529248, 0.018309468870314774, 4.9666775829792705e-278),
    ];

    #[test]
    fn as_exact_arithmetic_says() {
        for (wins, losses, low, high, p) in EXACT {
            let [found_low, found_high] = wilson(wins, losses).unwrap();
            assert!((found_low - low).abs() < 1e-14 && (found_high - high).abs() < 1e-14, "{wins}:{losses}");
            // Every step of the sum rounds its exponent (at most n ln 2 = 700 here) twice: n · 700 · 1.1e-16 for n = 1,000.
            assert!((sign_test(wins, losses) / p - 1.0).abs() < 1e-10, "{wins}:{losses} {} {p}", sign_test(wins, losses));
        }
    }

    #[test]
    fn nothing_is_no_evidence() {
        assert_eq!((wilson(0, 0), sign_test(0, 0), sign_test(7, 7), sign_test(1, 0)), (None, 1.0, 1.0, 1.0));
    }
}
