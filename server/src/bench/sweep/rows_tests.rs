//! What a row says of the rounds, in every form.

use super::super::clocked::{Lap, Steps};
use super::*;
use crate::Io;
use crate::bench::output::Writer;
use crate::bench::to_row;
use crate::cli::OutputFormat;
use engine::speculation::Curve;
use std::time::Duration;

fn setting() -> Setting {
    Setting {
        version: "1",
        date: "today".to_owned(),
        cpu: "a".to_owned(),
        model: "m".to_owned(),
        format: "w4g128".to_owned(),
        parameters: 1,
        weight_bytes: 1,
        device: "cpu".to_owned(),
        isa: None,
        threads: 2,
    }
}

fn args(acceptance: Option<f64>) -> SweepArgs {
    SweepArgs {
        draft: None,
        draft_shape: None,
        draft_tokens: vec![DraftTokens::Fixed(3), DraftTokens::Auto],
        acceptance,
        prompts: None,
        temperature: 0.0,
    }
}

/// Forty tokens in plain steps of 10 ms, and in twenty cycles of `millis` with three drafted.
fn round(millis: u64) -> Vec<Tally> {
    let tally = |cycles: usize, rows: usize, millis: u64, drafted: u64| {
        let time = Duration::from_millis(millis * cycles as u64);
        let verifier = Steps { time: time / 2, by_rows: [(rows, cycles)].into() };
        Tally {
            seconds: time.as_secs_f64(),
            tokens: 40,
            cycles,
            drafting_cycles: 0,
            drafted,
            accepted: drafted / 3,
            corrected: drafted / 6,
            lap: Lap { verifier, ..Lap::default() },
        }
    };
    let plain = tally(40, 1, 10, 0);
    let drafted = tally(20, 4, millis, 60);
    vec![plain, drafted.clone(), drafted]
}

fn rows(acceptance: Option<f64>) -> Vec<Row> {
    let verify = Curve::new(vec![(1, 0.010), (4, 0.012)]).unwrap();
    let costs = Costs { verify, draft: None, lookup: 0.0, token: 0.0 };
    let (args, draft) = (args(acceptance), "lookup".to_owned());
    let shared =
        Shared { setting: setting(), draft, tokens: 41, prompts: 1, args: &args, costs: &costs };
    let values = vec![round(16), round(10), round(12)];
    let kept = Kept { values, dropped: 1, loud: false, foreign: Some(0.01) };
    (0..3).map(|way| to_row(&shared.row(way, &kept)).unwrap()).collect()
}

#[test]
fn a_row_compares_within_rounds() {
    let rows = rows(None);
    let columns: Vec<&str> = SWEEP.columns().map(|(key, _)| *key).collect();
    assert_eq!(rows[1].keys().collect::<Vec<_>>(), columns);
    let near = |row: &Row, key: &str, value: f64| {
        let found = row[key].as_f64().unwrap();
        assert!((found - value).abs() < 1e-9 * value.abs(), "{key}: {found}, not {value}");
    };
    let (plain, drafted) = (&rows[0], &rows[1]);
    let lengths: Vec<&Value> = rows.iter().map(|row| &row["draft_tokens"]).collect();
    assert_eq!(lengths, ["off", "3", "auto"]);
    assert_eq!((&plain["speedup"], &plain["predicted_speedup"]), (&1.0.into(), &1.0.into()));
    assert_eq!((&plain["acceptance"], &plain["drafted_tokens"]), (&Value::Null, &0.into()));
    near(plain, "tokens_per_second", 100.0);
    // 400 ms against 20 cycles of 16, 10 and 12 ms.
    near(drafted, "speedup", 400.0 / 240.0);
    near(drafted, "speedup_min", 400.0 / 320.0);
    near(drafted, "speedup_max", 2.0);
    near(drafted, "tokens_per_second", 40.0 / 0.240);
    near(drafted, "predicted_speedup", 40.0 * 10.0 / (20.0 * 12.0));
    near(drafted, "acceptance", 2.0 / 3.0);
    near(drafted, "tokens_per_cycle", 2.0);
    near(drafted, "verify_seconds", 0.006);
    near(drafted, "other_seconds", 0.006);
    assert_eq!((&drafted["cycles"], &drafted["dropped"]), (&60.into(), &1.into()));
}

#[test]
fn every_form_says_what_is_simulated() {
    let printed = |format, acceptance| {
        let (mut out, mut err, mut input) = (vec![], vec![], std::io::empty());
        let mut io = Io {
            input: &mut input,
            out: &mut out,
            err: &mut err,
            input_is_terminal: false,
            out_is_terminal: false,
            err_is_terminal: false,
        };
        let mut writer = Writer::new(&SWEEP, format);
        rows(acceptance).iter().for_each(|row| writer.row(row, &mut io).unwrap());
        // Without the words below the table, which explain the mark.
        String::from_utf8(out).unwrap()
    };
    use OutputFormat::{Csv, Json, Jsonl, Md, Sql};
    for format in [Md, Csv, Json, Jsonl, Sql] {
        let [real, made_up] = [None, Some(0.8)].map(|acceptance| printed(format, acceptance));
        let marks = |text: &str| text.matches("0.80 simulated").count();
        assert_eq!((marks(&real), marks(&made_up)), (0, 2), "{format:?}: {made_up}");
    }
    let [real, made_up] = [None, Some(0.8)].map(rows);
    let marks = |rows: &[Row]| rows.iter().map(|r| r["simulated"].clone()).collect::<Vec<_>>();
    assert_eq!(
        (marks(&real), marks(&made_up)),
        (vec![false.into(); 3], { vec![false.into(), true.into(), true.into()] })
    );
    assert_eq!(made_up[0]["simulated_acceptance"], Value::Null, "plain decoding is real");
}
