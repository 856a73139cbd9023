//! Means with their standard errors. Refuses to name an error where one number alone was seen.

/// The mean of `values`; `None` of none.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The sample's standard deviation, with n − 1 in the denominator; `None` of fewer than two.
pub(crate) fn deviation(values: &[f64]) -> Option<f64> {
    let centre = mean(values)?;
    let squares: f64 = values.iter().map(|x| (x - centre) * (x - centre)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// The mean's standard error, `deviation / √n`.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    deviation(values).map(|sd| sd / (values.len() as f64).sqrt())
}

/// The standard error of the mean over all of `groups`, whose members belong together (two turns of one question), so that groups and
/// not members are what is drawn: √(G/(G−1) · Σ_g (Σ_{x∈g} (x − mean))²) / n. With one member a group it is [`standard_error`].
pub(crate) fn grouped_error<'a>(groups: impl IntoIterator<Item = &'a [f64]>, mean: f64) -> Option<f64> {
    let (mut squares, mut count, mut n) = (0.0, 0u64, 0);
    for group in groups.into_iter().filter(|group| !group.is_empty()) {
        let sum: f64 = group.iter().map(|x| x - mean).sum();
        (squares, count, n) = (squares + sum * sum, count + 1, n + group.len());
    }
    (count > 1).then(|| (count as f64 / (count - 1) as f64 * squares).sqrt() / n as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn errors_need_two_numbers() {
        assert_eq!(
            (mean(&[]), deviation(&[1.0]), standard_error(&[1.0]), grouped_error([&[1.0][..]], 1.0)),
            (None, None, None, None)
        );
        assert_eq!(mean(&[1.0, 2.0, 6.0]), Some(3.0));
        assert_eq!(deviation(&[1.0, 2.0, 6.0]), Some(7.0_f64.sqrt()));
    }

    #[test]
    fn groups_of_one_are_the_plain_error_and_twins_add_nothing() {
        let values = [1.0, 4.0, 2.5, 9.0];
        let plain = standard_error(&values).unwrap();
        let single: Vec<Vec<f64>> = values.iter().map(|x| vec![*x]).collect();
        let twins: Vec<Vec<f64>> = values.iter().map(|x| vec![*x, *x]).collect();
        let grouped = |groups: &[Vec<f64>]| grouped_error(groups.iter().map(Vec::as_slice), mean(&values).unwrap()).unwrap();
        assert!((grouped(&single) - plain).abs() < 1e-15);
        // Every number said twice is no more evidence.
        assert!((grouped(&twins) - plain).abs() < 1e-15);
    }
}
