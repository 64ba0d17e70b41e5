//! What repeated measurements say: the middle, the spread, and which of them to believe.
//!
//! Pure functions of numbers. Not here: clocks ([`super::machine`]).

/// The middle and the spread of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Of the sample; 0 for one value.
    pub(crate) deviation: f64,
}

impl Spread {
    /// Of at least one value; of none, all are NaN.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return Self { median: f64::NAN, min: f64::NAN, max: f64::NAN, deviation: f64::NAN };
        };
        let count = sorted.len();
        let median = f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]);
        let mean = sorted.iter().sum::<f64>() / count as f64;
        let squares: f64 = sorted.iter().map(|v| (v - mean).powi(2)).sum();
        let deviation = (squares / (count.max(2) - 1) as f64).sqrt();
        Self { median, min, max, deviation }
    }
}

/// Processor time during a repetition, in ticks of the system's books.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// Used by other processes.
    pub(crate) others: u64,
    /// That the whole machine had.
    pub(crate) all: u64,
}

/// Both clocks count whole ticks, so that the difference may be off by this many.
const TICKS_OFF: u64 = 2;

impl Foreign {
    fn is_loud(self, most: f64) -> bool {
        self.others.saturating_sub(TICKS_OFF) as f64 > most * self.all as f64
    }

    /// What others used of the machine, 0 to 1; none where no tick passed.
    pub(crate) fn share(self) -> Option<f64> {
        (self.all > 0).then(|| self.others as f64 / self.all as f64)
    }
}

/// One repetition.
#[derive(Debug, Clone)]
pub(crate) struct Repetition<T> {
    pub(crate) value: T,
    /// None where the system does not tell.
    pub(crate) foreign: Option<Foreign>,
}

/// The repetitions that count.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kept<T> {
    pub(crate) values: Vec<T>,
    /// Repetitions that were too loud and do not count.
    pub(crate) dropped: usize,
    /// None was quiet: the values are those of the quietest ones.
    pub(crate) loud: bool,
    /// What other processes used of the machine during the values; none where unknown.
    pub(crate) foreign: Option<f64>,
}

/// Repetitions that are tried for each one wanted.
const TRIES: usize = 3;

/// Measures until `wanted` repetitions were quiet: others used at most `most` of the machine. Gives
/// up after [`TRIES`] times as many, and then takes what was quiet, or else the quietest.
pub(crate) fn repeat<T, E>(
    wanted: usize,
    most: f64,
    mut measure: impl FnMut() -> Result<Repetition<T>, E>,
) -> Result<Kept<T>, E> {
    let (mut quiet, mut loud) = (vec![], vec![]);
    while quiet.len() < wanted && quiet.len() + loud.len() < TRIES * wanted {
        let one = measure()?;
        let is_loud = one.foreign.is_some_and(|foreign| foreign.is_loud(most));
        if is_loud { loud.push(one) } else { quiet.push(one) }
    }
    let tried = quiet.len() + loud.len();
    let none_quiet = quiet.is_empty();
    if none_quiet {
        let share = |one: &Repetition<T>| one.foreign.and_then(Foreign::share).unwrap_or(0.0);
        loud.sort_by(|a, b| share(a).total_cmp(&share(b)));
        loud.truncate(wanted);
        quiet = loud;
    }
    let known: Option<Vec<Foreign>> = quiet.iter().map(|one| one.foreign).collect();
    let sum = |all: &[Foreign]| Foreign {
        others: all.iter().map(|one| one.others).sum(),
        all: all.iter().map(|one| one.all).sum(),
    };
    let foreign = known.and_then(|all| sum(&all).share());
    let values: Vec<T> = quiet.into_iter().map(|one| one.value).collect();
    Ok(Kept { dropped: tried - values.len(), values, loud: none_quiet, foreign })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn the_middle_and_the_spread() {
        let odd = Spread::of(&[3.0, 1.0, 2.0]);
        assert_eq!(odd, Spread { median: 2.0, min: 1.0, max: 3.0, deviation: 1.0 });
        let even = Spread::of(&[4.0, 1.0]);
        assert_eq!((even.median, even.deviation), (2.5, (4.5f64).sqrt()));
        let one = Spread::of(&[7.0]);
        assert_eq!(one, Spread { median: 7.0, min: 7.0, max: 7.0, deviation: 0.0 });
        assert!(Spread::of(&[]).median.is_nan());
    }

    /// Repetitions 0, 1, 2, ... of 100 ticks, in which others use what `others` lists in turn.
    fn run(wanted: usize, others: &[u64]) -> Kept<usize> {
        let mut i = 0;
        let measure = || {
            let foreign = Some(Foreign { others: others[i % others.len()], all: 100 });
            i += 1;
            Ok::<_, Infallible>(Repetition { value: i - 1, foreign })
        };
        repeat(wanted, 0.05, measure).unwrap()
    }

    #[test]
    fn quiet_repetitions_are_kept() {
        let kept = run(3, &[0, 5, 7]);
        // 7 of 100 ticks may be 5 of 100: two ticks are within the clocks' error
        assert_eq!(
            kept,
            Kept { values: vec![0, 1, 2], dropped: 0, loud: false, foreign: Some(0.04) }
        );
    }

    #[test]
    fn loud_repetitions_are_dropped_and_repeated() {
        let kept = run(3, &[0, 50]);
        assert_eq!((kept.values, kept.dropped, kept.loud), (vec![0, 2, 4], 2, false));
        assert_eq!(kept.foreign, Some(0.0), "the share is that of the values that count");
    }

    #[test]
    fn quiet_ones_count_alone_even_if_they_are_too_few() {
        let kept = run(3, &[50, 50, 50, 50, 1, 50, 50, 50, 50]);
        assert_eq!((kept.values, kept.dropped, kept.loud), (vec![4], 8, false));
    }

    #[test]
    fn the_quietest_stand_in_where_none_is_quiet() {
        let kept = run(2, &[90, 50, 80, 20, 70, 60]);
        assert_eq!((kept.values, kept.dropped, kept.loud), (vec![3, 1], 4, true));
        assert_eq!(kept.foreign, Some(0.35));
    }

    #[test]
    fn where_nothing_is_known_nothing_is_dropped() {
        let measure = || Ok::<_, Infallible>(Repetition { value: (), foreign: None });
        let kept = repeat(4, 0.05, measure).unwrap();
        assert_eq!((kept.values.len(), kept.dropped, kept.foreign), (4, 0, None));
        let refused: Result<Kept<()>, &str> = repeat(4, 0.05, || Err("broken"));
        assert_eq!(refused, Err("broken"));
    }
}
