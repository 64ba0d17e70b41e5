//! What a step costs on this machine, as measured by whoever owns a clock.
//!
//! Input: seconds at a few numbers of rows. Not here: measuring, deciding ([`super`]).

/// Seconds of a step by its number of rows.
///
/// Straight lines between the measured points; before the first point its own value, after the
/// last one the mean slope from the first to the last, so that one noisy point cannot turn it.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    points: Vec<(usize, f64)>,
}

impl Curve {
    /// A curve through `points` (rows, seconds), in ascending order of rows.
    ///
    /// None if there is no point, if rows do not rise from at least 1, or if a time is not a
    /// positive number.
    pub fn new(points: Vec<(usize, f64)>) -> Option<Self> {
        let rising = points.is_sorted_by(|a, b| a.0 < b.0);
        let times = points.iter().all(|p| p.0 > 0 && p.1.is_finite() && p.1 > 0.0);
        (rising && times && !points.is_empty()).then_some(Self { points })
    }

    /// The measured points.
    pub fn points(&self) -> &[(usize, f64)] {
        &self.points
    }

    /// Seconds of a step of `rows` rows; no rows take no time.
    pub fn seconds(&self, rows: usize) -> f64 {
        if rows == 0 {
            return 0.0;
        }
        let after = self.points.partition_point(|p| p.0 < rows);
        let (first, last) = (self.points[0], self.points[self.points.len() - 1]);
        match self.points.get(after) {
            Some(point) if after == 0 => point.1,
            Some(&right) => {
                let left = self.points[after - 1];
                left.1 + slope(left, right) * (rows - left.0) as f64
            }
            None => last.1 + slope(first, last).max(0.0) * (rows - last.0) as f64,
        }
    }
}

/// Seconds a row between two points; 0 where they are the same.
fn slope(left: (usize, f64), right: (usize, f64)) -> f64 {
    (right.1 - left.1) / (right.0 - left.0).max(1) as f64
}

/// What a draft model costs.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftCosts {
    /// One of its steps by the number of sequences that draft; choosing the tokens included.
    pub step: Curve,
    /// More seconds of the first step of a cycle: the verifier's step before it has used the caches,
    /// and where steps follow each other on the device, all of them are waited for once.
    pub start: f64,
    /// Seconds of each token that it computes without proposing: following a prompt, catching up.
    pub prefill_token: f64,
}

/// Measured seconds of everything a cycle does.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The verifier's step by its rows, T(M), at least at 1 row.
    pub verify: Curve,
    /// The draft model's; none without one.
    pub draft: Option<DraftCosts>,
    /// Looking a proposal up in the text, for one sequence.
    pub lookup: f64,
    /// Choosing a generated token from its logits, drafted or not.
    pub token: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_goes_through_its_points_and_on() {
        let curve = Curve::new(vec![(1, 10.0), (2, 12.0), (4, 20.0)]).unwrap();
        let seconds: Vec<f64> = (0..6).map(|rows| curve.seconds(rows)).collect();
        assert_eq!(seconds[..5], [0.0, 10.0, 12.0, 16.0, 20.0]);
        // The mean slope: (20 - 10) / 3.
        assert!((seconds[5] - (20.0 + 10.0 / 3.0)).abs() < 1e-12, "{seconds:?}");
        let single = Curve::new(vec![(2, 3.0)]).unwrap();
        assert_eq!((single.seconds(1), single.seconds(2), single.seconds(9)), (3.0, 3.0, 3.0));
        let falling = Curve::new(vec![(1, 3.0), (2, 2.0)]).unwrap();
        assert_eq!(falling.seconds(3), 2.0, "more rows never cost less than measured");
    }

    #[test]
    fn what_cannot_be_a_measurement_is_no_curve() {
        assert_eq!(Curve::new(vec![]), None);
        assert_eq!(Curve::new(vec![(0, 1.0)]), None);
        assert_eq!(Curve::new(vec![(2, 1.0), (1, 2.0)]), None);
        assert_eq!(Curve::new(vec![(1, 1.0), (1, 2.0)]), None);
        assert_eq!(Curve::new(vec![(1, f64::NAN)]), None);
        assert_eq!(Curve::new(vec![(1, 0.0)]), None);
    }
}
