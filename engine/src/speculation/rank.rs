//! How well a draft suits a verifier, by teacher forcing: both read the same text, and at every
//! position their laws say how often a drafted token would be accepted there.
//!
//! Laws come from [`crate::sampler::Sampler::law`], row by row; only sums are kept. Positions of
//! one prompt are alike, so that errors are those of a mean over prompts: twice the positions of
//! the same prompts do not halve them. Not here: models, prompts, times, files; what a length of
//! draft costs.

use super::rejection::{acceptance, coupled_acceptance};
use crate::sampler::Law;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where the buckets of distance part, in tokens before the one that is predicted.
pub const DISTANCES: [u32; 6] = [16, 64, 256, 1024, 4096, 16384];

const BUCKETS: usize = DISTANCES.len() + 1;

/// Of some positions of one prompt: how many, and sums over them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sums {
    positions: u64,
    /// Of the five estimates in the order of [`Group::estimates`]: of the position's weight, and of
    /// its acceptance times its weight.
    weighted: [(f64, f64); 5],
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.positions += other.positions;
        for (a, b) in self.weighted.iter_mut().zip(other.weighted) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
    }
}

/// The positions of one prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    by_distance: [Sums; BUCKETS],
    /// The chances, by rejection and coupled, that the next position is judged if every cycle
    /// drafts one token. The first token comes of the prompt itself.
    judged: [f64; 2],
}

impl Prompt {
    /// Adds the next position, which has `distance` tokens before it, where these are the two laws.
    /// Greedy agreement is that of their likeliest tokens; with greedy laws all are the same.
    pub fn push(&mut self, distance: u32, verifier: &Law, draft: &Law) {
        let agrees = f64::from(u8::from(verifier.top() == draft.top()));
        let rules = [acceptance(verifier, draft), coupled_acceptance(verifier, draft)];
        let mut weighted = [(1.0, agrees); 5];
        for i in 0..2 {
            let (chance, judged) = (rules[i], self.judged[i]);
            weighted[i] = (1.0, chance);
            weighted[3 + i] = (judged, judged * chance);
            // What follows an accepted token is the verifier's own choice.
            self.judged[i] = 1.0 - judged * chance;
        }
        self.by_distance[bucket(distance)].add(&Sums { positions: 1, weighted });
    }
}

/// All prompts that a draft was tried on.
#[derive(Debug, Clone, Default)]
pub struct Ranking {
    overall: Group,
    by_category: BTreeMap<String, Group>,
    by_distance: [Group; BUCKETS],
}

impl Ranking {
    /// Adds a whole prompt, once; its positions count as one cluster.
    pub fn add(&mut self, category: &str, prompt: &Prompt) {
        let mut all = Sums::default();
        for (group, sums) in self.by_distance.iter_mut().zip(&prompt.by_distance) {
            group.add(sums);
            all.add(sums);
        }
        self.overall.add(&all);
        if !self.by_category.contains_key(category) {
            self.by_category.insert(category.to_owned(), Group::default());
        }
        if let Some(group) = self.by_category.get_mut(category) {
            group.add(&all);
        }
    }

    /// What stands so far; None without a position.
    pub fn report(&self) -> Option<Report> {
        let category = |(name, group): (&String, &Group)| Some((name.clone(), group.estimates()?));
        let distance = |(i, group): (usize, &Group)| Some((range(i), group.estimates()?));
        Some(Report {
            overall: self.overall.estimates()?,
            by_category: self.by_category.iter().filter_map(category).collect(),
            by_distance: self.by_distance.iter().enumerate().filter_map(distance).collect(),
        })
    }
}

/// A draft's acceptance over some text.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Over all positions.
    pub overall: Estimates,
    /// By category, in the order of their names.
    pub by_category: Vec<(String, Estimates)>,
    /// By the number of tokens before the predicted one, ascending, those with positions only.
    pub by_distance: Vec<(Range<u32>, Estimates)>,
}

/// The acceptances over the same positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimates {
    /// How many.
    pub positions: u64,
    /// Of how many prompts.
    pub prompts: u64,
    /// Of rejection sampling: [`acceptance`].
    pub rejection: Estimate,
    /// Of coupled choices: [`coupled_acceptance`].
    pub coupled: Estimate,
    /// Of greedy choices.
    pub greedy: Estimate,
    /// What a run counts that drafts one token a cycle; none where it drafts nothing.
    pub counted: Option<Counted>,
}

/// Shares of drafted tokens that a run accepts, a little below the means over positions: what
/// follows a rejected token is judged, what follows an accepted one is not, and hard places lie
/// together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counted {
    /// By rejection sampling.
    pub rejection: Estimate,
    /// By coupled choices.
    pub coupled: Estimate,
}

/// A mean over positions, in 0..=1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Every position counts alike, so that longer prompts count more.
    pub mean: f64,
    /// Its standard error over prompts; None with fewer than two.
    pub error: Option<f64>,
    /// `mean +- half_width` holds the true mean for 95 of 100 such sets of prompts (Student's
    /// distribution with one degree less than prompts). With fewer than about ten, or lengths
    /// that differ much, for somewhat fewer; the ends may lie outside 0..=1.
    pub half_width: Option<f64>,
}

/// Some positions of several prompts.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    prompts: u64,
    positions: u64,
    ratios: [Ratio; 5],
}

/// Sums over prompts c of weights `n_c`, accepted `s_c`, and their products.
#[derive(Debug, Clone, Copy, Default)]
struct Ratio {
    n: f64,
    s: f64,
    nn: f64,
    ns: f64,
    ss: f64,
}

impl Group {
    fn add(&mut self, prompt: &Sums) {
        if prompt.positions == 0 {
            return;
        }
        self.prompts += 1;
        self.positions += prompt.positions;
        self.ratios.iter_mut().zip(prompt.weighted).for_each(|(r, (n, s))| r.add(n, s));
    }

    fn estimates(&self) -> Option<Estimates> {
        if self.positions == 0 {
            return None;
        }
        let (positions, prompts) = (self.positions, self.prompts);
        let [rejection, coupled, greedy, counted_rejection, counted_coupled] =
            self.ratios.map(|ratio| ratio.estimate(prompts));
        // Nothing is drafted where every prompt has its first token only.
        let counted = (self.ratios[3].n > 0.0)
            .then_some(Counted { rejection: counted_rejection, coupled: counted_coupled });
        Some(Estimates { positions, prompts, rejection, coupled, greedy, counted })
    }
}

impl Ratio {
    fn add(&mut self, n: f64, s: f64) {
        self.n += n;
        self.s += s;
        self.nn += n * n;
        self.ns += n * s;
        self.ss += s * s;
    }

    /// The mean is a ratio of two sums over prompts. Its error is that ratio's, linearised (the
    /// cluster-robust variance): `C / (C - 1) sum (s_c - mean n_c)^2 / n^2` for C prompts.
    fn estimate(&self, prompts: u64) -> Estimate {
        let (n, mean) = (self.n, self.s / self.n);
        let squares = self.ss - 2.0 * mean * self.ns + mean * mean * self.nn;
        let count = prompts as f64;
        let error = (squares.max(0.0) * count / (count - 1.0)).sqrt() / n;
        let error = (prompts > 1).then_some(error);
        let half_width = error.map(|e| e * student(prompts - 1));
        Estimate { mean, error, half_width }
    }
}

/// Student's quantile with 2.5 % above it, to 0.3 %: the first three exactly, then the series in
/// `1 / freedom` around the normal quantile (Abramowitz and Stegun 26.7.5).
fn student(freedom: u64) -> f64 {
    match freedom {
        0 => f64::INFINITY,
        1 => 12.706,
        2 => 4.303,
        3 => 3.182,
        _ => {
            let v = 1.0 / freedom as f64;
            1.959_964 + v * (2.372_27 + v * (2.822_50 + v * 2.555_9))
        }
    }
}

fn bucket(distance: u32) -> usize {
    DISTANCES.partition_point(|&border| border <= distance)
}

fn range(bucket: usize) -> Range<u32> {
    let start = bucket.checked_sub(1).map_or(0, |i| DISTANCES[i]);
    start..DISTANCES.get(bucket).copied().unwrap_or(u32::MAX)
}

/// Tokens that a cycle emits on average, if the i-th drafted token is accepted with the i-th of
/// `acceptances` wherever those before it were: `1 + sum over i of prod over j <= i of a_j`. As
/// many tokens are drafted as there are acceptances.
///
/// With equal ones it is `(1 - a^(n + 1)) / (1 - a)` (Leviathan et al., arXiv 2211.17192).
pub fn expected_tokens(acceptances: impl IntoIterator<Item = f64>) -> f64 {
    let step = |(sum, reached): (f64, f64), a: f64| (sum + reached * a, reached * a);
    acceptances.into_iter().fold((1.0, 1.0), step).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::program::TokenId;
    use testkit::Rng;

    fn law(weights: &[f32]) -> Law {
        let weights: Vec<_> = (0..).map(TokenId).zip(weights.iter().copied()).collect();
        Law::from_weights(&weights).unwrap()
    }

    /// A position where rejection sampling accepts with this chance, and coupled choices too.
    fn push(prompt: &mut Prompt, distance: u32, acceptance: f32) {
        let draft = law(&[acceptance, 1.0 - acceptance]);
        prompt.push(distance, &Law::point(TokenId(0)), &draft);
    }

    fn prompt(acceptances: &[f32]) -> Prompt {
        let mut prompt = Prompt::default();
        (0..).zip(acceptances).for_each(|(i, &a)| push(&mut prompt, i, a));
        prompt
    }

    fn near(found: f64, expected: f64) {
        // f32 laws of a few entries: 1e-7 each.
        assert!((found - expected).abs() < 1e-6, "expected {expected}, found {found}");
    }

    #[test]
    fn the_three_acceptances_of_a_position_have_their_values_by_hand() {
        let mut ranking = Ranking::default();
        let mut one = Prompt::default();
        one.push(3, &law(&[0.5, 0.5, 0.0]), &law(&[0.0, 0.4, 0.6]));
        ranking.add("code", &one);
        let found = ranking.report().unwrap().overall;
        near(found.rejection.mean, 0.4);
        // Token 1: 1 / (0.5 / 0.5 + max(0.5 / 0.5, 0.4 / 0.4) + 0.6 / 0.4).
        near(found.coupled.mean, 1.0 / 3.5);
        near(found.greedy.mean, 0.0);
        assert_eq!((found.positions, found.prompts, found.rejection.error), (1, 1, None));
    }

    #[test]
    fn what_follows_an_accepted_token_is_not_counted() {
        let mut ranking = Ranking::default();
        ranking.add("", &prompt(&[0.25]));
        assert_eq!(ranking.report().unwrap().overall.counted, None, "the prompt gives one token");
        // Chances to be judged: 0, 1, 1 - 0.5, 1 - 0.5 * 1, 1 - 0.5 * 0.
        ranking.add("", &prompt(&[0.25, 0.5, 1.0, 0.0, 0.75]));
        let found = ranking.report().unwrap().overall;
        for counted in [found.counted.unwrap().rejection, found.counted.unwrap().coupled] {
            near(counted.mean, (0.5 + 0.5 + 0.75) / 3.0);
            // One prompt has all that count.
            near(counted.error.unwrap(), 0.0);
        }
    }

    #[test]
    fn counted_acceptance_is_that_of_simulated_cycles() {
        let (mut rng, mut ranking) = (Rng::new(5), Ranking::default());
        let (mut drafted, mut accepted) = (0, 0);
        // Places of three tokens alike, hard or easy.
        let chances: Vec<f32> = (0..300).flat_map(|_| [[0.9, 0.2][rng.below(2)]; 3]).collect();
        ranking.add("", &prompt(&chances));
        for _ in 0..200 {
            let mut position = 1;
            while position < chances.len() {
                let right = (rng.signed() + 1.0) / 2.0 < chances[position];
                drafted += 1;
                accepted += usize::from(right);
                position += if right { 2 } else { 1 };
            }
        }
        let (share, found) = (accepted as f64 / drafted as f64, ranking.report().unwrap().overall);
        // 120000 draws: a deviation of 0.0014.
        assert!((found.counted.unwrap().coupled.mean - share).abs() < 0.006, "{found:?}, {share}");
        assert!(found.coupled.mean - share > 0.05, "hard places weigh more: {found:?}, {share}");
    }

    #[test]
    fn means_weigh_positions_and_errors_weigh_prompts() {
        let mut ranking = Ranking::default();
        ranking.add("code", &prompt(&[1.0, 0.5]));
        ranking.add("text", &prompt(&[0.0]));
        ranking.add("empty", &Prompt::default());
        let found = ranking.report().unwrap().overall;
        assert_eq!((found.positions, found.prompts), (3, 2));
        near(found.rejection.mean, 0.5);
        // Residuals 1.5 - 0.5 * 2 and 0 - 0.5 * 1: sqrt(2 * (0.25 + 0.25)) / 3.
        near(found.rejection.error.unwrap(), 1.0 / 3.0);
        near(found.rejection.half_width.unwrap(), 12.706 / 3.0);
        near(found.greedy.mean, 2.0 / 3.0);
    }

    #[test]
    fn categories_and_distances_part_the_positions() {
        let mut ranking = Ranking::default();
        let mut one = Prompt::default();
        for (distance, a) in [(15, 0.25), (16, 0.5), (63, 0.75), (64, 1.0), (u32::MAX, 0.0)] {
            push(&mut one, distance, a);
        }
        ranking.add("text", &one);
        ranking.add("code", &prompt(&[0.125]));
        let found = ranking.report().unwrap();
        let names: Vec<&str> = found.by_category.iter().map(|c| c.0.as_str()).collect();
        assert_eq!(names, ["code", "text"]);
        near(found.by_category[0].1.rejection.mean, 0.125);
        near(found.by_category[1].1.rejection.mean, 0.5);
        let ranges: Vec<_> = found.by_distance.iter().map(|d| d.0.clone()).collect();
        assert_eq!(ranges, [0..16, 16..64, 64..256, 16384..u32::MAX]);
        let counts: Vec<_> =
            found.by_distance.iter().map(|d| (d.1.positions, d.1.prompts)).collect();
        assert_eq!(counts, [(2, 2), (2, 1), (1, 1), (1, 1)]);
        near(found.by_distance[0].1.rejection.mean, 0.1875);
        near(found.by_distance[1].1.rejection.mean, 0.625);
    }

    #[test]
    fn nothing_added_is_no_report() {
        let mut ranking = Ranking::default();
        ranking.add("code", &Prompt::default());
        assert_eq!(ranking.report(), None);
    }

    #[test]
    fn equal_laws_are_always_accepted_without_error() {
        let mut ranking = Ranking::default();
        let p = law(&[0.3, 0.6, 0.1]);
        for positions in [3, 700, 41] {
            let mut prompt = Prompt::default();
            (0..positions).for_each(|i| prompt.push(i, &p, &p));
            ranking.add("", &prompt);
        }
        let found = ranking.report().unwrap().overall;
        for estimate in [found.rejection, found.coupled, found.greedy] {
            near(estimate.mean, 1.0);
            near(estimate.error.unwrap(), 0.0);
        }
    }

    /// Prompts of 5 to 24 positions, whose own means scatter by 0.2 around 0.5, and positions by
    /// 0.2 around those: whether the interval holds 0.5, by prompts, and by positions as if each
    /// were a prompt.
    fn covers(rng: &mut Rng, prompts: usize) -> [bool; 2] {
        let (mut by_prompt, mut by_position) = (Ranking::default(), Ranking::default());
        for _ in 0..prompts {
            let own = 0.5 + 0.25 * rng.signed();
            let values: Vec<f32> =
                (0..5 + rng.below(20)).map(|_| own + 0.25 * rng.signed()).collect();
            by_prompt.add("", &prompt(&values));
            values.iter().for_each(|&a| by_position.add("", &prompt(&[a])));
        }
        [by_prompt, by_position].map(|ranking| {
            let found = ranking.report().unwrap().overall.rejection;
            (found.mean - 0.5).abs() <= found.half_width.unwrap()
        })
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        let mut rng = Rng::new(21);
        for prompts in [10, 40] {
            let mut held = [0; 2];
            for _ in 0..2000 {
                covers(&mut rng, prompts)
                    .iter()
                    .zip(&mut held)
                    .for_each(|(&c, n)| *n += u32::from(c));
            }
            // 1900 with a deviation of 10; unequal lengths cost about 1 % of coverage. Errors that
            // took positions for independent would be far below.
            assert!((1850..=1950).contains(&held[0]), "{prompts} prompts: {held:?} of 2000");
            assert!(held[1] < 1600, "{prompts} prompts: {held:?} of 2000");
        }
    }

    #[test]
    fn students_quantiles_are_those_of_the_tables() {
        for (freedom, expected) in [(1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
        {
            let found = student(freedom);
            assert!((found / expected - 1.0).abs() < 0.003, "{freedom}: {found}");
        }
    }

    #[test]
    fn expected_tokens_are_the_closed_form_for_equal_acceptances() {
        assert_eq!(expected_tokens([]), 1.0);
        assert_eq!(expected_tokens([0.5, 0.25, 1.0]), 1.0 + 0.5 + 0.125 + 0.125);
        assert_eq!(expected_tokens([1.0; 5]), 6.0);
        for (a, n) in [(0.0f64, 3), (0.3, 1), (0.8, 8), (0.99, 16)] {
            let closed = (1.0 - a.powi(n + 1)) / (1.0 - a);
            let found = expected_tokens((0..n).map(|_| a));
            // At most 17 roundings in f64, divided by 0.01.
            assert!((found - closed).abs() < 1e-12, "{a} {n}: {found} {closed}");
        }
    }
}
