//! Expected speeds were computed apart from this code, from the formulas of transformers 5.

use super::*;
use serde_json::{Value, json};
use std::path::PathBuf;

fn config(value: Value) -> Reader {
    let Value::Object(map) = value else { panic!("an object is needed") };
    Reader::new(PathBuf::from("config.json"), map)
}

/// Reads a head of `width` columns and a model of `context` positions.
fn rope(value: Value, width: usize, context: u32) -> (RopeDecl, u32) {
    let config = config(value);
    let found = read(&config, width, context).unwrap();
    config.finish().unwrap();
    found
}

fn refused(value: Value) -> String {
    read(&config(value), 16, 64).unwrap_err().to_string()
}

#[track_caller]
fn assert_speeds(rope: &RopeDecl, expected: &[f64]) {
    let RopeSpeeds::Fixed(found) = &rope.speeds else { panic!("{rope:?}") };
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        // Both are computed in f64; rounding to f32 is half an ulp.
        assert!((f64::from(*f) - e).abs() <= 1e-7 * e, "{found:?}");
    }
}

#[test]
fn no_key_at_all_is_the_plain_table() {
    let (plain, context) = rope(json!({}), 8, 512);
    assert_speeds(&plain, &[1.0, 0.1, 0.01, 0.001]);
    assert_eq!((plain.amplitude, plain.width, context), (1.0, 8, 512));
    for same in [
        json!({"rope_scaling": null, "rope_theta": 10000}),
        json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e4}),
        json!({"rope_scaling": {}, "partial_rotary_factor": 1.0}),
        json!({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}),
    ] {
        assert_eq!(rope(same, 8, 512).0, plain);
    }
}

#[test]
fn linear_divides_and_dynamic_reaches_further() {
    let linear = json!({"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4}});
    let (linear, context) = rope(linear, 8, 512);
    assert_speeds(
        &linear,
        &[0.25, 0.014058533129758726, 0.0007905694150420947, 4.445698525097307e-05],
    );
    assert_eq!(context, 512);
    let dynamic = json!({"rope_parameters": {
        "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32 // counts for other types only
    }});
    let (dynamic, context) = rope(dynamic, 8, 64);
    let speeds = RopeSpeeds::DynamicNtk { theta: 1e4, factor: 4.0, trained: 64 };
    assert_eq!(dynamic, RopeDecl { width: 8, speeds, amplitude: 1.0 });
    assert_eq!(context, 4 * 256);
    let longer = json!({"max_sequence_length": 2048});
    assert_eq!(rope(longer, 8, 512).1, 2048);
}

#[test]
fn yarn_blends_over_its_ramp() {
    let yarn = |extra: Value| {
        let mut dict = json!({"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 64});
        dict.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        rope(json!({"rope_theta": 1e4, "rope_scaling": dict}), 16, 64)
    };
    let (plain, context) = yarn(json!({}));
    let tail =
        [0.007905694150420948, 0.0025, 0.0007905694150420947, 0.00025, 7.905694150420948e-05];
    let with_tail = |head: [f64; 3]| [&head[..], &tail].concat();
    assert_speeds(&plain, &with_tail([1.0, 0.23717082451262847, 0.05]));
    assert_eq!(plain.amplitude, 1.138_629_4);
    assert_eq!(context, 256, "the trained length times the factor");
    let (smooth, _) = yarn(json!({"truncate": false}));
    assert_speeds(&smooth, &with_tail([1.0, 0.19858352015369318, 0.02559524589192421]));
    assert_eq!(yarn(json!({"beta_fast": 0, "beta_slow": null, "mscale": 1.0})).0, plain);
    assert_eq!(yarn(json!({"attention_factor": 0.5})).0.amplitude, 0.5);
    assert_eq!(yarn(json!({"factor": null})).0.amplitude, 1.0, "64 / 64 scales by nothing");
}

#[test]
fn yarn_knows_betas_and_both_mscales() {
    let yarn = json!({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 40,
        "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2,
        "mscale": 0.707, "mscale_all_dim": 1.0, "finetuned": true}});
    let (yarn, context) = rope(yarn, 16, 163_840);
    assert_eq!(yarn.amplitude, 0.921_042_4);
    assert_eq!(context, 163_840);
    let expected = [
        1.0,
        0.31622776601683794,
        0.1,
        0.03162277660168379,
        0.00675,
        0.001106797181058933,
        2.5e-05,
        7.905694150420949e-06,
    ];
    assert_speeds(&yarn, &expected);
}

#[test]
fn llama3_scales_by_wavelength() {
    let dict = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let expected = [
        1.0,
        0.0794030091792082,
        0.004700753866357992,
        0.0009115830921521386,
        0.00017677669529663688,
        3.428102195952591e-05,
        6.647869871181236e-06,
        1.2891731721515574e-06,
    ];
    let (old, context) = rope(json!({"rope_theta": 5e5, "rope_scaling": dict}), 16, 512);
    assert_speeds(&old, &expected);
    assert_eq!(context, 512);
    // The length beside the dictionary outranks the one inside.
    let mut outranked = dict.clone();
    outranked["original_max_position_embeddings"] = json!(4096);
    outranked["rope_theta"] = json!(5e5);
    let new = json!({"rope_parameters": outranked, "original_max_position_embeddings": 64});
    assert_eq!(rope(new, 16, 512).0, old);
}

#[test]
fn longrope_has_two_tables() {
    let dict = json!({"type": "longrope", "short_factor": [1, 2, 1, 1], "long_factor": [4, 4, 4, 8],
        "original_max_position_embeddings": 64});
    let (long, context) = rope(json!({"rope_scaling": dict}), 8, 512);
    let RopeSpeeds::Switched { short, long: far, switch } = &long.speeds else { panic!() };
    assert_eq!((*switch, context), (64, 512));
    assert_eq!(short, &[1.0, 0.05, 0.01, 0.001]);
    assert_eq!(far, &[0.25, 0.025, 0.0025, 0.000125]);
    assert_eq!(long.amplitude, 1.224_744_9, "sqrt(1 + ln(512 / 64) / ln(64))");
    let mut given = dict;
    given["factor"] = json!(32);
    assert_eq!(rope(json!({"rope_scaling": given}), 8, 512).0.amplitude, 1.354_006_4);
}

#[test]
fn what_cannot_be_computed_is_refused_by_key() {
    let says = |err: String, what: &str| assert!(err.contains(what), "{err}");
    let dict = |d: Value| refused(json!({"rope_scaling": d}));
    says(dict(json!({"type": "su"})), "rope_scaling.type is \"su\"");
    says(dict(json!({"rope_type": "mrope"})), "rope_scaling.rope_type is \"mrope\"");
    says(dict(json!({"rope_type": "yarn", "type": "linear"})), "the same as rope_type");
    says(dict(json!({"type": "linear"})), "rope_scaling.factor is missing");
    says(dict(json!({"type": "linear", "factor": 0})), "rope_scaling.factor is 0");
    says(dict(json!({"type": "linear", "factor": "4"})), "rope_scaling.factor");
    says(dict(json!({"type": "linear", "factor": 2, "x": 1})), "rope_scaling.x");
    says(dict(json!({"type": "default", "factor": 2})), "rope_scaling.factor");
    says(dict(json!({"partial_rotary_factor": 0.5})), "every column must rotate");
    says(refused(json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor is 0.5");
    says(refused(json!({"rope_theta": -1})), "rope_theta is -1");
    says(refused(json!({"rope_theta": 1e30})), "rope_theta is 1e+30");
    says(refused(json!({"rope_scaling": "linear"})), "rope_scaling is \"linear\"");
    says(
        dict(json!({"type": "longrope", "short_factor": [1], "long_factor": [1]})),
        "rope_scaling.short_factor is [1], expected a list of 8 positive numbers",
    );
    says(
        dict(json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
        "rope_scaling.high_freq_factor is 4, expected more than 4",
    );
    says(
        refused(json!({"rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "default"}})),
        "rope_scaling",
    );
    // Layer types with tables of their own belong to other architectures.
    says(
        refused(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
        "rope_parameters.full_attention",
    );
}
