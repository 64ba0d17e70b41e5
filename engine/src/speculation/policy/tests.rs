//! The policy against simulated drafters: never much slower than plain decoding, and close to the
//! best fixed length where there is one.

use super::*;
use testkit::Rng;

/// Measured times of some pair, in the verifier's steps of one row.
#[derive(Debug, Clone, Copy)]
struct Pair {
    name: &'static str,
    /// T(1), T(2), T(4), T(8).
    verify: [f64; 4],
    /// A draft step.
    draft: f64,
}

const FLAT: [f64; 4] = [1.0, 1.02, 1.05, 1.1];
const AVX2: [f64; 4] = [1.0, 1.21, 1.62, 3.1];
/// Of the demo verifier, which lies in the caches.
const AMX: [f64; 4] = [1.0, 1.15, 1.45, 2.15];
/// Longest draft.
const LONGEST: usize = 7;
/// A draft model's prefill against its step; as bound by computing as it gets.
const PREFILL: f64 = 0.2;

impl Pair {
    fn all() -> Vec<Self> {
        let verifiers = [("flat", FLAT), ("avx2", AVX2), ("amx", AMX)];
        let with = |draft| verifiers.map(|(name, verify)| Self { name, verify, draft });
        [0.02, 0.2, 0.5].into_iter().flat_map(with).collect()
    }

    fn costs(&self) -> Costs {
        let points = [1, 2, 4, 8].into_iter().zip(self.verify).collect();
        let step = Curve::new(vec![(1, self.draft)]).unwrap();
        let draft = DraftCosts { step, start: 0.0, prefill_token: PREFILL * self.draft };
        Costs { verify: Curve::new(points).unwrap(), draft: Some(draft), lookup: 0.0, token: 0.0 }
    }

    /// The time of a cycle, without the policy's own arithmetic.
    fn time(&self, drafted: usize, caught_up: usize) -> f64 {
        let [one, two, four, eight] = self.verify;
        let verify = match 1 + drafted {
            1 => one,
            rows @ 2..=4 => two + (rows - 2) as f64 * (four - two) / 2.0,
            rows => four + (rows - 4) as f64 * (eight - four) / 4.0,
        };
        verify + self.draft * drafted as f64 + PREFILL * self.draft * caught_up as f64
    }
}

/// What a text and a drafter do.
#[derive(Debug, Clone, Copy)]
enum Process {
    Constant(f64),
    /// One acceptance, then the other, each for so many tokens.
    Switching(f64, f64, usize),
    /// A new acceptance every few tokens.
    Random,
    /// Accepts whatever is drafted until it is drafted more than so many tokens.
    Adversary(usize),
    /// Accepts everything until so many tokens, then nothing.
    Betrayal(usize),
    /// Accepts every so many-th draft alone.
    Teasing(usize),
    /// Accepts nothing until so many tokens, then nine of ten.
    Late(usize),
}

struct World {
    process: Process,
    rng: Rng,
    acceptance: f64,
    cycles: usize,
}

impl World {
    fn new(process: Process, seed: u64) -> Self {
        Self { process, rng: Rng::new(seed), acceptance: 0.5, cycles: 0 }
    }

    fn unit(&mut self) -> f64 {
        (self.rng.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// How many of `drafted` tokens are accepted after `position` tokens.
    fn accepted(&mut self, position: usize, drafted: usize) -> usize {
        self.cycles += usize::from(drafted > 0);
        let chance =
            match self.process {
                Process::Constant(chance) => chance,
                Process::Switching(first, second, period) => {
                    if (position / period).is_multiple_of(2) { first } else { second }
                }
                Process::Random => {
                    if self.unit() < 0.05 {
                        self.acceptance = self.unit();
                    }
                    self.acceptance
                }
                Process::Adversary(most) => f64::from(u8::from(drafted <= most)),
                Process::Betrayal(end) => f64::from(u8::from(position < end)),
                Process::Teasing(period) => f64::from(u8::from(self.cycles.is_multiple_of(period))),
                Process::Late(start) => 0.9 * f64::from(u8::from(position >= start)),
            };
        (0..drafted).take_while(|_| self.unit() < chance).count()
    }
}

/// How long `tokens` tokens take at a fixed length.
fn fixed(pair: &Pair, process: Process, length: usize, tokens: usize, seed: u64) -> f64 {
    let mut world = World::new(process, seed);
    let (mut time, mut done) = (0.0, 0);
    while done < tokens {
        let drafted = length.min(tokens - done - 1);
        done += 1 + world.accepted(done, drafted);
        time += pair.time(drafted, 0);
    }
    time
}

/// A sequence.
#[derive(Debug, Clone, Copy)]
struct Text {
    process: Process,
    /// Tokens of its prompt, that it may generate, and that it generates.
    prompt: usize,
    allowed: usize,
    tokens: usize,
}

/// The same with the policy.
fn automatic(policy: &mut Policy, pair: &Pair, text: Text, seed: u64) -> f64 {
    let Text { process, prompt, allowed, tokens } = text;
    let mut world = World::new(process, seed);
    let mut own = Acceptance::default();
    let source = Source::Model;
    policy.open();
    let follows = policy.follows(&Prospect {
        source,
        acceptance: &own,
        most: LONGEST,
        lag: prompt,
        left: allowed,
    });
    let mut lag = if follows { 0 } else { prompt };
    let (mut time, mut done) = (0.0, 0);
    while done < tokens {
        let (left, most) = (allowed - done, LONGEST.min(allowed - done - 1));
        policy.begin();
        policy.add(&Prospect { source, acceptance: &own, most, lag, left });
        let drafted = policy.choose(0).next().unwrap();
        assert!(drafted <= most);
        let accepted = world.accepted(done, drafted);
        let generated = (accepted + 1).min(tokens - done);
        let caught_up = if drafted > 0 { std::mem::take(&mut lag) } else { 0 };
        let outcome = Outcome {
            source,
            drafted,
            judged: drafted.min(generated),
            accepted: accepted.min(generated),
            tokens: generated,
            caught_up,
        };
        policy.record(&mut own, &outcome);
        policy.settle(0);
        lag += if drafted == 0 { 1 } else { usize::from(accepted == drafted) };
        done += generated;
        time += pair.time(drafted, caught_up);
    }
    time
}

fn fresh(pair: &Pair) -> Policy {
    Policy::new(pair.costs(), LONGEST)
}

fn processes() -> Vec<Process> {
    let constant = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95].map(Process::Constant);
    let mut all = constant.to_vec();
    for period in [3, 10, 50, 200] {
        all.push(Process::Switching(0.95, 0.0, period));
        all.push(Process::Switching(0.0, 0.95, period));
        all.push(Process::Switching(0.8, 0.2, period));
    }
    all.extend([Process::Random, Process::Betrayal(40), Process::Betrayal(200)]);
    all.extend((0..LONGEST).map(Process::Adversary));
    all.extend([2, 3, 4, 6].map(Process::Teasing));
    all.extend([2, 4, 8, 16].map(Process::Late));
    all
}

#[test]
fn never_slower_than_plain_decoding_by_more_than_two_in_a_hundred() {
    let mut worst = (f64::MAX, String::new());
    for pair in Pair::all() {
        for process in processes() {
            for (seed, tokens) in (0..30).zip([256, 300, 1000].into_iter().cycle()) {
                let prompt = [0, 64][seed as usize % 2];
                let text = Text { process, prompt, allowed: tokens, tokens };
                let time = automatic(&mut fresh(&pair), &pair, text, seed);
                let speedup = tokens as f64 / time;
                if speedup < worst.0 {
                    worst = (speedup, format!("{pair:?} {process:?}, {tokens} tokens"));
                }
            }
        }
    }
    println!("least speed against plain decoding: {worst:?}");
    assert!(worst.0 >= 0.98, "{worst:?}");
}

#[test]
fn close_to_the_best_fixed_length_where_acceptance_stays() {
    const SEEDS: u64 = 40;
    let mut worst = (f64::MAX, String::new());
    for pair in Pair::all() {
        for acceptance in [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95] {
            let process = Process::Constant(acceptance);
            let mean = |time: &dyn Fn(u64) -> f64| (0..SEEDS).map(time).sum::<f64>() / SEEDS as f64;
            let at = |length| mean(&|seed| fixed(&pair, process, length, 1000, seed));
            let (best, length) =
                (0..=LONGEST).map(|n| (at(n), n)).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            let text = Text { process, prompt: 64, allowed: 1000, tokens: 1000 };
            let time = mean(&|seed| automatic(&mut fresh(&pair), &pair, text, seed));
            let share = best / time;
            println!(
                "{} {}: {acceptance}: {share:.3} of {:.2}x at length {length}",
                pair.name,
                pair.draft,
                1000.0 / best
            );
            if share < worst.0 {
                worst = (share, format!("{pair:?} {process:?}"));
            }
        }
    }
    println!("least share of the best fixed length's speed: {worst:?}");
    assert!(worst.0 >= 0.93, "{worst:?}");
}

#[test]
fn a_bad_beginning_is_not_the_end() {
    const SEEDS: u64 = 40;
    let mut worst = (f64::MAX, String::new());
    for pair in Pair::all() {
        for start in [1, 2, 4, 8] {
            let process = Process::Late(start);
            let mean = |time: &dyn Fn(u64) -> f64| (0..SEEDS).map(time).sum::<f64>() / SEEDS as f64;
            let at = |length| mean(&|seed| fixed(&pair, process, length, 500, seed));
            let best = (0..=LONGEST).map(at).fold(f64::MAX, f64::min);
            let text = Text { process, prompt: 64, allowed: 500, tokens: 500 };
            let time = mean(&|seed| automatic(&mut fresh(&pair), &pair, text, seed));
            println!("{pair:?} {process:?}: {:.3} of {:.2}x", best / time, 500.0 / best);
            if best / time < worst.0 {
                worst = (best / time, format!("{pair:?} {process:?}"));
            }
        }
    }
    println!("least share of the best fixed length's speed: {worst:?}");
    // 0.86 is found; 0.47 with less lent and with long drafts of a source that was never right.
    assert!(worst.0 >= 0.8, "{worst:?}");
}

#[test]
fn short_answers_are_not_slowed_down_either() {
    let mut worst = (f64::MAX, String::new());
    for pair in Pair::all() {
        for (process, tokens) in processes().into_iter().flat_map(|p| [3, 10, 40].map(|n| (p, n))) {
            let (mut policy, answers) = (fresh(&pair), 1000 / tokens);
            let text = Text { process, prompt: 64, allowed: 1000, tokens };
            let time: f64 =
                (0..answers as u64).map(|seed| automatic(&mut policy, &pair, text, seed)).sum();
            let speedup = (answers * tokens) as f64 / time;
            if speedup < worst.0 {
                worst = (speedup, format!("{pair:?} {process:?}, {tokens} tokens"));
            }
        }
    }
    println!("least speed against plain decoding: {worst:?}");
    assert!(worst.0 >= 0.98, "{worst:?}");
}

/// A policy that has seen `acceptance` in 50 cycles of each place, and a sequence that has too.
fn experienced(costs: Costs, source: Source, acceptance: f64) -> (Policy, Acceptance) {
    let mut policy = Policy::new(costs, LONGEST);
    let mut own = Acceptance::default();
    policy.open();
    let mut world = World::new(Process::Constant(acceptance), 5);
    for _ in 0..200 {
        let accepted = world.accepted(0, LONGEST);
        let judged = LONGEST.min(accepted + 1);
        let tokens = accepted + 1;
        let (drafted, caught_up) = (LONGEST, 0);
        let outcome = Outcome { source, drafted, judged, accepted, tokens, caught_up };
        policy.record(&mut own, &outcome);
    }
    policy.done = Load::default();
    policy.tokens = 0;
    policy.account.book(0.0, 1000.0, false);
    (policy, own)
}

/// Lengths that are expected to pay, without probes.
fn lengths(policy: &mut Policy, sequences: &[Prospect<'_>], other: usize) -> Vec<usize> {
    policy.begin();
    sequences.iter().for_each(|s| policy.add(s));
    policy.draft_the_best(Load { sequences: sequences.len(), other, ..Load::default() });
    policy.candidates.iter().map(|c| c.length).collect()
}

fn prospect(source: Source, acceptance: &Acceptance) -> Prospect<'_> {
    Prospect { source, acceptance, most: LONGEST, lag: 0, left: 1000 }
}

fn costs(verify: &[(usize, f64)], draft: f64) -> Costs {
    let step = Curve::new(vec![(1, draft)]).unwrap();
    let draft = DraftCosts { step, start: 0.0, prefill_token: draft };
    let verify = Curve::new(verify.to_vec()).unwrap();
    Costs { verify, draft: Some(draft), lookup: 0.0, token: 0.0 }
}

#[test]
fn a_bump_in_the_verifiers_cost_does_not_stop_the_search() {
    // Two rows cost as much as four.
    let verify = [(1, 1.0), (2, 1.9), (4, 1.9), (5, 9.0), (8, 12.0)];
    let (mut policy, own) = experienced(costs(&verify, 0.01), Source::Model, 0.9);
    assert_eq!(lengths(&mut policy, &[prospect(Source::Model, &own)], 0), [3]);
}

#[test]
fn sequences_share_the_rows_that_are_cheap() {
    // Sixteen rows are nearly free, more are not.
    let verify = [(1, 1.0), (16, 1.1), (17, 3.0), (32, 48.0)];
    let (mut policy, good) = experienced(costs(&verify, 0.01), Source::Model, 0.9);
    let alone = lengths(&mut policy, &[prospect(Source::Model, &good)], 0);
    assert_eq!(alone, [LONGEST]);
    let four = lengths(&mut policy, &[prospect(Source::Model, &good); 4], 0);
    assert_eq!(four.iter().sum::<usize>(), 12, "{four:?}");
    assert!(four.iter().all(|&n| n == 3), "{four:?}");
    let sixteen = lengths(&mut policy, &[prospect(Source::Model, &good); 16], 0);
    assert_eq!(sixteen.iter().sum::<usize>(), 0);
    let mut bad = Acceptance::default();
    (0..100).for_each(|_| bad.book(&mut Acceptance::default(), Source::Model, 1, 0));
    let pair = [prospect(Source::Model, &bad), prospect(Source::Model, &good)];
    let mixed = lengths(&mut policy, &pair, 0);
    assert!(mixed[0] < 4 && mixed[1] == LONGEST, "{mixed:?}");
    let beside_a_prompt = lengths(&mut policy, &[prospect(Source::Model, &good)], 500);
    assert_eq!(beside_a_prompt, [0], "rows beside a prompt cost what they cost there");
}

#[test]
fn a_lookup_costs_rows_but_no_draft_steps() {
    let long = Source::Lookup { matched: 20 };
    let (mut policy, own) = experienced(costs(&[(1, 1.0), (8, 1.5)], 5.0), long, 0.8);
    let pair = [prospect(long, &own), prospect(Source::Model, &own)];
    assert_eq!(lengths(&mut policy, &pair, 0), [LONGEST, 0]);
    assert!(policy.verdict(Source::Model).measured.is_none());
    assert!((policy.verdict(long).measured.unwrap() - 0.8).abs() < 0.05);
}

#[test]
fn what_is_far_behind_catches_up_where_that_pays_before_the_end() {
    let (mut policy, own) = experienced(costs(&[(1, 1.0), (8, 1.1)], 0.05), Source::Model, 0.9);
    let behind = |lag, left| Prospect { lag, left, ..prospect(Source::Model, &own) };
    assert!(lengths(&mut policy, &[behind(50, 500)], 0)[0] > 0);
    assert_eq!(lengths(&mut policy, &[behind(200, 4)], 0), [0]);
    assert!(policy.follows(&behind(200, 500)));
    assert!(!policy.follows(&behind(2000, 20)), "a long prompt for a short answer");
}

#[test]
fn a_crowd_is_not_slowed_down_either() {
    let mut least = f64::MAX;
    for pair in Pair::all() {
        for seed in 0..20 {
            let speedup = crowd(&pair, seed);
            least = least.min(speedup);
        }
    }
    println!("least speed of five sequences against plain decoding: {least}");
    assert!(least >= 0.98, "{least}");
}

/// Speed against plain decoding of five sequences of 256 tokens, each with another acceptance.
fn crowd(pair: &Pair, seed: u64) -> f64 {
    let (mut policy, costs) = (fresh(pair), pair.costs());
    let mut rng = Rng::new(seed);
    let acceptances = [0.0, 0.3, 0.5, 0.7, 0.95].map(|a| if rng.below(3) == 0 { 0.0 } else { a });
    let mut worlds = acceptances.map(|a| World::new(Process::Constant(a), rng.bits()));
    let mut owns = [(); 5].map(|()| Acceptance::default());
    let (mut lags, mut done) = ([0; 5], [0; 5]);
    (0..5).for_each(|_| policy.open());
    let (mut time, mut plain) = (0.0, 0.0);
    while done.iter().any(|&d| d < 256) {
        let open: Vec<usize> = (0..5).filter(|&i| done[i] < 256).collect();
        policy.begin();
        for &i in &open {
            let (left, most) = (256 - done[i], LONGEST.min(255 - done[i]));
            let (source, acceptance) = (Source::Model, &owns[i]);
            policy.add(&Prospect { source, acceptance, most, lag: lags[i], left });
        }
        let lengths: Vec<usize> = policy.choose(0).collect();
        let rows = open.len() + lengths.iter().sum::<usize>();
        let steps = lengths.iter().max().map_or(0, |&n| n);
        time += costs.verify.seconds(rows) + pair.draft * steps as f64;
        for (&i, &drafted) in open.iter().zip(&lengths) {
            let accepted = worlds[i].accepted(done[i], drafted);
            let caught_up = if drafted > 0 { std::mem::take(&mut lags[i]) } else { 0 };
            let (judged, tokens) = (drafted.min(accepted + 1), accepted + 1);
            let source = Source::Model;
            policy.record(
                &mut owns[i],
                &Outcome { source, drafted, judged, accepted, tokens, caught_up },
            );
            lags[i] += if drafted == 0 { 1 } else { usize::from(accepted == drafted) };
            done[i] += tokens;
            time += PREFILL * pair.draft * caught_up as f64;
            plain += costs.verify.seconds(open.len()) / open.len() as f64 * tokens as f64;
        }
        policy.settle(0);
    }
    plain / time
}

#[test]
fn choosing_takes_microseconds() {
    let (mut policy, own) = experienced(costs(&[(1, 1.0), (64, 1.5)], 0.01), Source::Model, 0.8);
    let all = [prospect(Source::Model, &own); 32];
    lengths(&mut policy, &all, 0);
    let start = std::time::Instant::now();
    (0..100).for_each(|_| assert_eq!(lengths(&mut policy, &all, 0).len(), 32));
    let many = start.elapsed() / 100;
    let start = std::time::Instant::now();
    (0..100).for_each(|_| assert_eq!(lengths(&mut policy, &all[..1], 0).len(), 1));
    let one = start.elapsed() / 100;
    println!("lengths of one sequence {one:?}, of 32 {many:?}");
    // A hundred times what it takes, for a busy machine; a cycle may spend 20 us in all.
    assert!(one.as_micros() < 100 && many.as_micros() < 5000, "{one:?} {many:?}");
}
