//! `foretoken bench --draft` in process: rows of plain decoding and of every draft length, whose
//! figures agree with each other, and what a wrong word answers.
//!
//! Times are only checked against each other. Not here: forms of rows (the bench's own tests).

use crate::cli::{assert_refused, foretoken};
use serde_json::Value;

/// One round counts, however loud the machine is.
const ONE_ROUND: &str = "-r 1 --max-foreign 100 -o json";

fn rows(words: &str) -> Vec<Value> {
    let words = format!("bench {words} {ONE_ROUND}");
    let printed = foretoken(&words.split_whitespace().collect::<Vec<_>>());
    assert_eq!(printed.code, 0, "{}", printed.err);
    serde_json::from_str(&printed.out).expect("an array of rows")
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {row}"))
}

fn lengths(rows: &[Value]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["draft_tokens"].as_str()).collect()
}

fn near(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 1e-6
}

/// What holds of every row, whatever the machine does.
fn check(row: &Value, plain: &Value) {
    // The first token of each prompt is not timed.
    let tokens = number(row, "prompts") * (number(row, "tokens") - 1.0);
    let cycles = number(row, "cycles");
    assert!(near(number(row, "tokens_per_cycle"), tokens / cycles), "{row}");
    // All times of a cycle make up the rate.
    let parts = ["draft_seconds", "verify_seconds", "other_seconds"].map(|key| number(row, key));
    assert!(parts[0] >= 0.0 && parts[1] > 0.0 && parts[2] >= 0.0, "{row}");
    let seconds = cycles * parts.iter().sum::<f64>();
    assert!(near(number(row, "tokens_per_second"), tokens / seconds), "{row}");
    let ratio = number(row, "tokens_per_second") / number(plain, "tokens_per_second");
    assert!(near(number(row, "speedup"), ratio), "{row}");
    // Costs are measured, so a factor of twenty off is a wrong formula and no slow moment.
    let predicted = number(row, "predicted_speedup") / ratio;
    assert!((0.05..20.0).contains(&predicted), "{row}");
    let (drafted, accepted) = (number(row, "drafted_tokens"), number(row, "accepted_tokens"));
    assert!(accepted <= drafted && cycles + accepted >= tokens, "{row}");
    assert_eq!(row["acceptance"].is_null(), drafted == 0.0, "{row}");
}

#[test]
fn the_demo_pair_beside_plain_decoding() {
    let rows = rows("--draft demo-draft --draft-tokens 2,auto -n 24 --temperature 0.7");
    assert_eq!(lengths(&rows), ["off", "2", "auto"]);
    rows.iter().for_each(|row| check(row, &rows[0]));
    let (plain, two) = (&rows[0], &rows[1]);
    assert_eq!((&plain["tokens_per_cycle"], &plain["speedup"]), (&1.0.into(), &1.0.into()));
    assert_eq!(plain["draft_seconds"], 0.0, "the draft rests while others are measured");
    assert!(number(two, "draft_seconds") > 0.0 && number(two, "tokens_per_cycle") > 1.2, "{two}");
    // The pair agrees on about three tokens of four (greedily; a little less when sampling).
    assert!((0.4..1.0).contains(&number(two, "acceptance")), "{two}");
    for row in &rows {
        assert_eq!(
            (&row["simulated"], &row["simulated_acceptance"]),
            (&false.into(), &Value::Null)
        );
        assert_eq!((&row["model"], &row["draft"]), (&"demo".into(), &"demo-draft".into()));
        assert_eq!(row["temperature"], 0.7);
    }
}

#[test]
fn lookups_take_no_draft_model() {
    let rows = rows("demo-draft --draft lookup --draft-tokens 3 -n 4,24 -t 1");
    assert_eq!(lengths(&rows), ["off", "3", "off", "3"], "a pair of rows for each -n");
    for pair in rows.chunks(2) {
        pair.iter().for_each(|row| check(row, &pair[0]));
        assert_eq!(pair[1]["draft_seconds"], 0.0);
    }
}

#[test]
fn simulated_acceptance_is_found_again() {
    // A draft that is always right, but for the coins.
    let rows = rows("demo-draft --draft demo-draft --draft-tokens 1,4 -n 128 --acceptance 0.8");
    assert_eq!(lengths(&rows), ["off", "1", "4"]);
    assert_eq!((&rows[0]["simulated"], &rows[0]["acceptance"]), (&false.into(), &Value::Null));
    for row in &rows[1..] {
        check(row, &rows[0]);
        assert_eq!((&row["simulated"], &row["simulated_acceptance"]), (&true.into(), &0.8.into()));
        assert!(row["test"].as_str().is_some_and(|test| test.ends_with("0.80 simulated")), "{row}");
        let accepted = number(row, "accepted_tokens");
        let judged = accepted / number(row, "acceptance");
        assert!(judged > 350.0, "{row}");
        // Four standard deviations of so many coins: one run of 16000 would be outside, and the
        // seeds are always the same.
        let error = 4.0 * (0.8 * 0.2 / judged).sqrt();
        assert!((accepted / judged - 0.8).abs() < error, "not within {error}: {row}");
    }
    // 1 + a + a^2 + a^3 + a^4, give or take what 0.08 of acceptance make, and ends of texts.
    assert!((number(&rows[2], "tokens_per_cycle") - 3.3616).abs() < 0.6, "{}", rows[2]);
}

#[test]
fn shapes_have_made_up_drafts() {
    let words = "--shape smollm2-135m --draft-shape demo-draft --acceptance 1 -n 7 -t 2";
    let rows = rows(&format!("{words} --draft-tokens 2"));
    assert_eq!(lengths(&rows), ["off", "2"]);
    rows.iter().for_each(|row| check(row, &rows[0]));
    assert_eq!((&rows[1]["acceptance"], &rows[1]["tokens_per_cycle"]), (&1.0.into(), &3.0.into()));
    assert_eq!((&rows[1]["draft"], &rows[1]["prompts"]), (&"demo-draft".into(), &1.into()));
}

#[test]
fn people_see_what_is_simulated() {
    let words = "bench demo-draft --draft lookup --draft-tokens 2 --acceptance 0.5 -n 8 -r 1 -o md";
    let printed = foretoken(&words.split_whitespace().collect::<Vec<_>>());
    assert_eq!(printed.code, 0, "{}", printed.err);
    let lines: Vec<&str> = printed.out.lines().collect();
    assert!(lines[0].contains("speed-up") && lines[0].contains("predicted"), "{}", printed.out);
    assert!(lines[2].contains(" off ") && !lines[2].contains("simulated"), "{}", printed.out);
    assert!(lines[3].contains("(0.50 simulated)"), "{}", printed.out);
    assert!(printed.out.contains("the text means nothing"), "{}", printed.out);
}

#[test]
fn mistakes_get_one_sentence() {
    for (words, parts) in [
        ("--draft ./nowhere", &["./nowhere", "folder"][..]),
        ("--draft off", &["--draft off"]),
        ("--draft lookup -n 1", &["above 1"]),
        ("--draft lookup -n 1000000", &["context", "--gen-tokens"]),
        ("--draft lookup --temperature 101", &["temperature"]),
        ("--draft lookup --prompts ./nowhere", &["./nowhere"]),
        ("--shape smollm2-135m --draft-shape gpt-9 --acceptance 0.5", &["gpt-9"]),
    ] {
        let words: Vec<&str> = ["bench"].into_iter().chain(words.split_whitespace()).collect();
        assert_refused(&foretoken(&words), parts);
    }
}
