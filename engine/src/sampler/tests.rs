//! The sampler against the golden vectors, its law against its draws, and its edge cases.

use super::*;
use crate::request::Rejected;
use proptest::prelude::*;
use serde_json::Value;

/// The reference rounds scores to f32 before an exact softmax; `1e-5` is the data's own bound.
const TOLERANCE: f64 = 1e-5;

fn row(values: &Value) -> Vec<f32> {
    let logit = |v: &Value| v.as_f64().map_or(f32::NEG_INFINITY, |x| x as f32);
    values.as_array().unwrap().iter().map(logit).collect()
}

fn tokens(values: &Value) -> Vec<TokenId> {
    values.as_array().unwrap().iter().map(|v| TokenId(v.as_u64().unwrap() as u32)).collect()
}

fn ids(values: &[u32]) -> Vec<TokenId> {
    values.iter().map(|&v| TokenId(v)).collect()
}

fn chain(vector: &Value) -> Vec<(String, Value)> {
    let step = |s: &Value| (s[0].as_str().unwrap().to_owned(), s[1].clone());
    vector["chain"].as_array().unwrap().iter().map(step).collect()
}

fn bias(value: &Value) -> Vec<(TokenId, f32)> {
    let entry = |(k, v): (&String, &Value)| (TokenId(k.parse().unwrap()), number(v));
    value.as_object().unwrap().iter().map(entry).collect()
}

fn number(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

/// Applies one transform of a chain; false if it is not one of ours.
fn apply(
    name: &str,
    value: &Value,
    history: &History<'_>,
    row_v: &mut [f32],
    kept: &mut Vec<Candidate>,
) -> bool {
    let mut tally = Tally::default();
    let dense = matches!(name, "logit_bias" | "repetition_penalty" | "penalties");
    match name {
        "logit_bias" => adjust::logit_bias(row_v, &bias(value)),
        "repetition_penalty" => adjust::repetition(row_v, history, number(value), &mut tally),
        "penalties" => {
            let (f, p) = (number(&value[0]), number(&value[1]));
            adjust::frequency_presence(row_v, history.generated, f, p, &mut tally);
        }
        "temperature" => filter::temperature(kept, number(value)),
        "top_k" => filter::top_k(kept, value.as_u64().unwrap() as usize),
        "top_p" => filter::top_p(kept, number(value)),
        "min_p" => filter::min_p(kept, number(value)),
        "typical_p" => filter::typical_p(kept, number(value)),
        _ => return false,
    }
    if dense {
        filter::gather(row_v, kept).unwrap();
    }
    true
}

/// The parameters of a chain, if its steps come in our fixed order.
fn params_of(chain: &[(String, Value)]) -> Option<SamplingParams> {
    const ORDER: [&str; 8] = [
        "logit_bias",
        "repetition_penalty",
        "penalties",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ];
    let places: Option<Vec<usize>> =
        chain.iter().map(|(n, _)| ORDER.iter().position(|o| o == n)).collect();
    if !places?.is_sorted() {
        return None;
    }
    let mut params = SamplingParams::default();
    for (name, value) in chain {
        match name.as_str() {
            "logit_bias" => params.logit_bias = bias(value),
            "repetition_penalty" => params.repetition_penalty = number(value),
            "penalties" => {
                params.frequency_penalty = number(&value[0]);
                params.presence_penalty = number(&value[1]);
            }
            "temperature" => params.temperature = number(value),
            "top_k" => params.top_k = value.as_u64().unwrap() as u32,
            "top_p" => params.top_p = number(value),
            "min_p" => params.min_p = number(value),
            _ => params.typical_p = number(value),
        }
    }
    Some(params)
}

/// Compares with the listed probabilities; where equal logits lie on a border of top-p the
/// reference keeps whichever its sort puts there, so `ties` compares the sorted probabilities.
fn compare(found: &[(TokenId, f32)], vector: &Value, vocab: usize, ties: bool) {
    let dense = |pairs: &mut dyn Iterator<Item = (usize, f64)>| {
        let mut all = vec![0.0; vocab];
        pairs.for_each(|(i, p)| all[i] = p);
        if ties {
            all.sort_by(f64::total_cmp);
        }
        all
    };
    let listed = tokens(&vector["ids"]);
    let listed = listed.iter().zip(vector["probs"].as_array().unwrap());
    let expected = dense(&mut listed.map(|(t, p)| (t.index(), p.as_f64().unwrap())));
    let found = dense(&mut found.iter().map(|(t, p)| (t.index(), f64::from(*p))));
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        let what = format!("{} {}, token {i}", vector["logits"], vector["chain"]);
        assert!((f - e).abs() <= TOLERANCE, "{what}: expected {e}, found {f}");
        assert!(*e != 0.0 || *f == 0.0, "{what}: expected exactly zero, found {f}");
        assert!(*f != 0.0 || *e < 1e-30, "{what}: expected {e}, found exactly zero");
    }
}

#[test]
fn golden_vectors_hold_for_single_transforms_and_the_composite() {
    let file = testkit::golden_json("sampling/vectors.json");
    let (mut single, mut composite, mut foreign) = (0, 0, 0);
    for vector in file["vectors"].as_array().unwrap() {
        let logits_v = row(&file["logits"][vector["logits"].as_str().unwrap()]);
        let (prompt, generated) = (tokens(&vector["prompt"]), tokens(&vector["generated"]));
        let history = History { prompt: &prompt, generated: &generated };
        let ties = vector["logits"] == "ties24";
        let (mut row_v, mut kept) = (logits_v.clone(), Vec::new());
        filter::gather(&row_v, &mut kept).unwrap();
        let steps = chain(vector);
        if !steps.iter().all(|(n, v)| apply(n, v, &history, &mut row_v, &mut kept)) {
            foreign += 1;
            continue;
        }
        compare(&filter::probabilities(&mut kept), vector, logits_v.len(), ties);
        single += 1;
        if let Some(params) = params_of(&steps) {
            params.validate().unwrap();
            let found = candidates(&logits_v, &history, &params).unwrap();
            compare(&found, vector, logits_v.len(), ties);
            composite += 1;
        }
    }
    // Ours does not know epsilon, eta and no_repeat_ngram; one chain has another order.
    assert_eq!((single, composite, foreign), (255, 247, 24));
}

fn greedy(logits_v: &[f32]) -> Result<TokenId, LogitsError> {
    sample(logits_v, &History::default(), &SamplingParams::greedy(), 0)
}

#[test]
fn greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() {
    assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), Ok(TokenId(1)));
    assert_eq!(greedy(&[-0.0, 0.0]), Ok(TokenId(0)));
    assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0]), Ok(TokenId(1)));
}

/// The greedy choice by its definition.
fn simple_argmax(logits_v: &[f32]) -> Result<TokenId, LogitsError> {
    let mut best = (f32::NEG_INFINITY, None);
    for (token, &logit) in (0u32..).zip(logits_v) {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(LogitsError::NotFinite { token });
        }
        if logit > best.0 {
            best = (logit, Some(TokenId(token)));
        }
    }
    best.1.ok_or(LogitsError::NoCandidate)
}

#[test]
fn greedy_sees_bias_and_penalties() {
    let history = History { prompt: &ids(&[1]), generated: &ids(&[2, 2]) };
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams::greedy();
        change(&mut params);
        sample(&[1.0, 4.0, 4.5, -9.0], &history, &params, 3).unwrap().0
    };
    assert_eq!(with(&|_| ()), 2);
    assert_eq!(with(&|p| p.frequency_penalty = 0.5), 1);
    assert_eq!(with(&|p| p.presence_penalty = 0.6), 1);
    assert_eq!(with(&|p| p.repetition_penalty = 5.0), 0);
    assert_eq!(with(&|p| p.logit_bias = vec![(TokenId(3), 20.0), (TokenId(77), 99.0)]), 3);
}

#[test]
fn rows_without_a_finite_maximum_are_errors_not_panics() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for params in [SamplingParams::greedy(), SamplingParams::default()] {
        let on = |row: &[f32]| sample(row, &History::default(), &params, 0);
        assert_eq!(on(&[0.0, nan, nan]), Err(LogitsError::NotFinite { token: 1 }));
        assert_eq!(on(&[0.0, 1.0, inf]), Err(LogitsError::NotFinite { token: 2 }));
        assert_eq!(on(&[-inf, -inf]), Err(LogitsError::NoCandidate));
        assert_eq!(on(&[]), Err(LogitsError::NoCandidate));
    }
}

#[test]
fn extreme_temperatures_stay_finite() {
    let logits_v = [30_000.0, -30_000.0, 29_999.0];
    for temperature in [f32::MIN_POSITIVE, 1e-3, 100.0] {
        let params = SamplingParams { temperature, ..Default::default() };
        let found = candidates(&logits_v, &History::default(), &params).unwrap();
        let sum: f32 = found.iter().map(|c| c.1).sum();
        assert_eq!(found[0].0, TokenId(0));
        assert!((sum - 1.0).abs() < 1e-6, "{temperature}: {sum}");
    }
}

#[test]
fn equal_logits_on_the_border_of_top_p_go_by_id() {
    let params = SamplingParams { top_p: 0.6, ..Default::default() };
    let found = candidates(&[0.0, -0.0, 0.0, -0.0], &History::default(), &params).unwrap();
    assert_eq!(found.iter().map(|c| c.0.0).collect::<Vec<_>>(), [0, 1, 2]);
}

/// Counts draws over `n` positions and compares them with the law by Pearson's chi-square.
fn chi_square(logits_v: &[f32], params: &SamplingParams, n: u32) -> (f64, usize) {
    let law = candidates(logits_v, &History::default(), params).unwrap();
    let (mut counts, mut sampler) = (vec![0u32; logits_v.len()], Sampler::default());
    for position in 0..n {
        let token = sampler.sample(logits_v, &History::default(), params, position).unwrap();
        counts[token.index()] += 1;
    }
    let drawn: u32 = law.iter().map(|(t, _)| counts[t.index()]).sum();
    assert_eq!(drawn, n, "a removed token was drawn");
    let term = |&(t, p): &(TokenId, f32)| {
        let expected = f64::from(p) * f64::from(n);
        (f64::from(counts[t.index()]) - expected).powi(2) / expected
    };
    (law.iter().map(term).sum(), law.len() - 1)
}

#[test]
fn draws_follow_the_probabilities() {
    let mut rng = testkit::Rng::new(7);
    for seed in 0..12 {
        let logits_v = rng.floats(24, 2.0);
        let top_p = if seed % 2 == 0 { 1.0 } else { 0.8 };
        let params = SamplingParams { seed, top_p, temperature: 0.9, ..Default::default() };
        let (statistic, freedom) = chi_square(&logits_v, &params, 20_000);
        // Mean f, variance 2 f: five deviations above the mean happen by chance about once in 1e4,
        // and the seeds are fixed.
        let bound = freedom as f64 + 5.0 * (2.0 * freedom as f64).sqrt();
        assert!(statistic < bound, "seed {seed}: chi-square {statistic} of {freedom}");
    }
}

/// Draws of neighbouring seeds and positions must not be related.
#[test]
fn noise_is_uniform_across_seeds_positions_and_tokens() {
    let mut low = [0u32; 3];
    let n = 40_000u32;
    for i in 0..n {
        let halves = [
            NoiseKey::new(u64::from(i), 0).bits(TokenId(0)),
            NoiseKey::new(0, i).bits(TokenId(0)),
            NoiseKey::new(0, 0).bits(TokenId(i)),
        ];
        halves.iter().zip(&mut low).for_each(|(bits, low)| *low += (bits >> 63) as u32);
    }
    // Half of n with a deviation of sqrt(n) / 2 = 100.
    low.iter().for_each(|&l| assert!(l.abs_diff(n / 2) < 500, "{low:?}"));
}

/// Values computed from the module's text by another program, so that no later change alters the noise unnoticed.
#[test]
fn noise_is_the_documented_function() {
    let key = NoiseKey::new(0x0123_4567_89ab_cdef, 42);
    let bits: Vec<u64> = [0, 1, 150_000].iter().map(|&t| key.bits(TokenId(t))).collect();
    assert_eq!(bits, [0x325d_4b8c_16b4_ff3f, 0x0ac8_bd06_bd55_55f8, 0x7d2d_b0c7_1ba9_56d5]);
}

proptest! {
    /// Rows of few values, so that most are tied, with up to three odd ones anywhere.
    #[test]
    fn greedy_is_what_its_definition_says(
        seed: u64, vocab in 0usize..1200, values in 1u64..40, least: bool,
        odd in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..7), 0..4),
    ) {
        const ODD: [f32; 7] =
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::MIN];
        let mut rng = testkit::Rng::new(seed);
        let mut value = || match rng.bits() % values {
            0 if seed % 2 == 0 => -0.0,
            x => x as f32 - 3.0,
        };
        let blank = |x| if least { f32::NEG_INFINITY } else { x };
        let mut row: Vec<f32> = (0..vocab).map(|_| blank(value())).collect();
        if vocab > 0 {
            odd.iter().for_each(|(at, which)| row[at.index(vocab)] = ODD[*which]);
        }
        prop_assert_eq!(greedy(&row), simple_argmax(&row));
    }

    /// Where no token is removed, the draw never makes a list of candidates; it must be the same.
    #[test]
    fn the_draw_of_a_whole_row_is_that_of_its_candidates(
        seed: u64, position: u32, vocab in 1usize..700, scale in 0.0f32..80.0,
        temperature in prop_oneof![Just(1.0f32), 0.01f32..3.0, Just(f32::MIN_POSITIVE)],
        odd in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..4), 0..4),
    ) {
        const ODD: [f32; 4] = [f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN];
        let mut row = testkit::Rng::new(seed).floats(vocab, scale);
        odd.iter().for_each(|(at, which)| row[at.index(vocab)] = ODD[*which]);
        let mut kept = Vec::new();
        let expected = filter::gather(&row, &mut kept).map(|()| {
            filter::temperature(&mut kept, temperature);
            let key = NoiseKey::new(seed, position);
            let score = |c: &Candidate| f64::from(c.logit) + noise::gumbel(key.bits(c.token));
            let likelier = |a: &Candidate, b: &Candidate| {
                score(a).total_cmp(&score(b)).then(b.token.cmp(&a.token))
            };
            kept.iter().copied().max_by(likelier).unwrap().token
        });
        let params = SamplingParams { temperature, seed, ..Default::default() };
        prop_assert_eq!(sample(&row, &History::default(), &params, position), expected);
    }

    #[test]
    fn bits_beyond_the_most_never_reach_a_noise(bits: u64, shift in 0u32..64, noise in -5.0..40.0f64) {
        let bits = bits >> shift;
        if noise::gumbel_max(bits) >= noise {
            prop_assert!(noise::most_bits(noise).is_some_and(|most| bits <= most));
        }
        let bound = noise::gumbel_max(bits);
        prop_assert!(noise::most_bits(bound).is_some_and(|most| bits <= most), "{bits} {bound}");
    }

    #[test]
    fn noise_stays_below_its_cheap_bound(bits: u64, shift in 0u32..64) {
        let bits = bits >> shift;
        let (noise, bound) = (noise::gumbel(bits), noise::gumbel_max(bits));
        prop_assert!(noise.is_finite() && noise <= bound, "{noise} {bound}");
        prop_assert!((-3.7..36.8).contains(&noise), "{noise}");
    }

    #[test]
    fn the_draw_is_the_largest_score_of_all(seed: u64, position: u32, scale in 0.0f32..20.0) {
        let logits_v = testkit::Rng::new(seed).floats(500, scale);
        let params = SamplingParams { seed, ..Default::default() };
        let found = sample(&logits_v, &History::default(), &params, position).unwrap();
        let key = NoiseKey::new(seed, position);
        let score = |t: u32| f64::from(logits_v[t as usize]) + noise::gumbel(key.bits(TokenId(t)));
        let best = (0..500).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap();
        prop_assert_eq!(found.0, best);
    }

    #[test]
    fn filters_keep_what_a_full_sort_keeps(seed: u64, vocab in 1usize..3000, p in 0.01f32..1.0) {
        let logits_v = testkit::Rng::new(seed).floats(vocab, 1.0);
        let mut kept = Vec::new();
        filter::gather(&logits_v, &mut kept).unwrap();
        let mut all = filter::probabilities(&mut kept.clone());
        filter::top_p(&mut kept, p);
        let mut mass = 0.0;
        all.retain(|c| {
            let keep = mass < f64::from(p);
            mass += f64::from(c.1);
            keep
        });
        // Probabilities here are rounded to f32: the border may move by one token.
        prop_assert!(kept.len().abs_diff(all.len()) <= 1, "{} {}", kept.len(), all.len());
        let top = all[0].0;
        prop_assert!(kept.iter().any(|c| c.token == top));
    }

    /// What a device is asked for is what is chosen here.
    #[test]
    fn a_draw_chooses_as_the_sampler_does(
        row in proptest::collection::vec(any::<f32>(), 0..40), seed: u64, position: u32,
        vocab in 1usize..600, t in prop_oneof![Just(0.0f32), Just(1.0), 0.001f32..=3.0],
    ) {
        let params = SamplingParams { temperature: t, seed, ..Default::default() };
        let rule = draw(&params, 3, position).unwrap();
        for row in [row, testkit::Rng::new(seed).floats(vocab, 5.0)] {
            let here = sample(&row, &History::default(), &params, position).ok();
            prop_assert_eq!(kernels::reference::choose(&row, rule), here);
        }
    }

    #[test]
    fn any_row_and_any_valid_parameters_give_a_candidate_or_an_error(
        row in proptest::collection::vec(any::<f32>(), 0..40),
        t in 0.0f32..=100.0, k in 0u32..50, p in 0.001f32..=1.0, q in 0.0f32..=1.0,
        r in 0.01f32..=100.0, f in -2.0f32..=2.0, seed: u64,
    ) {
        let params = SamplingParams {
            temperature: t, top_k: k, top_p: p, min_p: q, typical_p: p, repetition_penalty: r,
            frequency_penalty: f, presence_penalty: -f, logit_bias: vec![(TokenId(3), 50.0 * f)], seed,
            min_tokens: 4, end_tokens: ids(&[1]),
        };
        prop_assert_eq!(params.validate(), Ok(()));
        let history = History { prompt: &ids(&[0, 5, 90]), generated: &ids(&[2, 3, 2]) };
        let Ok(token) = sample(&row, &history, &params, 1) else { return Ok(()) };
        let law = candidates(&row, &history, &params).unwrap();
        prop_assert!(law.iter().any(|c| c.0 == token));
        prop_assert!((law.iter().map(|c| f64::from(c.1)).sum::<f64>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn what_needs_more_than_logits_is_no_draw() {
    let plain = SamplingParams::default();
    let is_draw = |params: &SamplingParams| draw(params, 3, 9).is_some();
    assert!(is_draw(&plain) && is_draw(&SamplingParams::greedy()));
    assert!(is_draw(&SamplingParams { top_k: 5, ..SamplingParams::greedy() }));
    let held = SamplingParams { min_tokens: 4, end_tokens: ids(&[1]), ..plain.clone() };
    assert!(!is_draw(&held) && draw(&held, 4, 9).is_some());
    for params in [
        SamplingParams { top_k: 5, ..plain.clone() },
        SamplingParams { top_p: 0.9, ..plain.clone() },
        SamplingParams { min_p: 0.1, ..plain.clone() },
        SamplingParams { typical_p: 0.9, ..plain.clone() },
        SamplingParams { repetition_penalty: 1.1, ..plain.clone() },
        SamplingParams { frequency_penalty: 0.1, ..SamplingParams::greedy() },
        SamplingParams { presence_penalty: 0.1, ..plain.clone() },
        SamplingParams { logit_bias: vec![(TokenId(1), 1.0)], ..plain },
    ] {
        assert!(!is_draw(&params), "{params:?}");
    }
}

#[test]
fn parameters_outside_their_range_are_named() {
    let refuse = |name: &str, change: &dyn Fn(&mut SamplingParams, f32), values: &[f32]| {
        for &value in values.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut params = SamplingParams::default();
            change(&mut params, value);
            match params.validate() {
                Err(Rejected::Parameter { parameter, .. }) => assert_eq!(parameter, name),
                other => panic!("{name} = {value}: {other:?}"),
            }
        }
    };
    refuse("temperature", &|p, v| p.temperature = v, &[-0.1, 100.5]);
    refuse("top_p", &|p, v| p.top_p = v, &[0.0, -1.0, 1.01]);
    refuse("min_p", &|p, v| p.min_p = v, &[-0.1, 1.1]);
    refuse("typical_p", &|p, v| p.typical_p = v, &[0.0, 1.1]);
    refuse("repetition_penalty", &|p, v| p.repetition_penalty = v, &[0.0, -1.0, 101.0]);
    refuse("frequency_penalty", &|p, v| p.frequency_penalty = v, &[-2.1, 2.1]);
    refuse("presence_penalty", &|p, v| p.presence_penalty = v, &[-2.1, 2.1]);
    refuse("logit_bias", &|p, v| p.logit_bias = vec![(TokenId(0), v)], &[-101.0, 101.0]);
    assert_eq!(SamplingParams::default().validate(), Ok(()));
    assert_eq!(SamplingParams::greedy().validate(), Ok(()));
}
