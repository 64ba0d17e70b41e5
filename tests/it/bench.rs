//! `foretoken bench` in process: rows in every form, figures that agree with each other, and what
//! a wrong word answers.

use crate::cli::{assert_refused, foretoken};
use serde_json::Value;

fn json(words: &[&str]) -> Vec<Value> {
    let printed = foretoken(words);
    assert_eq!(printed.code, 0, "{}", printed.err);
    serde_json::from_str(&printed.out).expect("an array of rows")
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {row}"))
}

fn assert_near(row: &Value, key: &str, expected: f64) {
    let found = number(row, key);
    assert!((found / expected - 1.0).abs() < 1e-9, "{key} is {found}, not {expected}: {row}");
}

#[test]
fn rates_follow_from_times() {
    let rows = json(&["bench", "demo", "-p", "16", "-n", "8", "-r", "1", "-o", "json"]);
    let tests: Vec<&Value> = rows.iter().map(|row| &row["test"]).collect();
    assert_eq!(tests, ["pp16", "tg8"]);
    let inspected = foretoken(&["inspect", "demo", "--json"]);
    let inspected: Value = serde_json::from_str(&inspected.out).expect("one object");
    for (row, tokens) in rows.iter().zip([16.0, 8.0]) {
        let seconds = number(row, "seconds");
        assert!(seconds > 0.0 && seconds < 60.0, "{row}");
        assert_near(row, "tokens_per_second", tokens / seconds);
        assert_near(row, "tokens_per_second_max", tokens / seconds);
        assert_eq!(row["tokens_per_second_stddev"], 0.0, "one repetition has no spread");
        assert_eq!(row["samples_seconds"].as_array().map(Vec::len), Some(1));
        let share = number(row, "bytes_per_second") / number(row, "read_bandwidth");
        assert_near(row, "share_of_read_bandwidth", share);
        assert!(number(row, "int8_peak") > 0.0 && number(row, "share_of_int8_peak") > 0.0);
        assert_eq!((&row["model"], &row["device"]), (&"demo".into(), &"cpu".into()));
        assert_eq!(row["weight_bytes"], inspected["weight_bytes"]);
        assert_eq!(row["verify_cost"], Value::Null);
        for key in ["version", "date", "cpu", "format", "isa"] {
            assert!(row[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {row}");
        }
    }
    // Every step reads all weights once and the keys and values of at most eight tokens.
    let moved = number(&rows[1], "bytes_per_second") * number(&rows[1], "seconds") / 8.0;
    let (weights, kv) =
        (number(&inspected, "bytes_per_token"), number(&inspected, "kv_bytes_per_token"));
    assert!((weights + kv..=weights + 8.0 * kv).contains(&moved), "{moved} {weights} {kv}");
    // A prompt gives logits of its last token only, a decoded token of each.
    let ops = |row| number(row, "ops_per_second") * number(row, "seconds");
    assert!(ops(&rows[0]) < 2.0 * ops(&rows[1]) * (1.0 - 1e-6), "sixteen tokens with one head");
}

#[test]
fn depth_batch_threads_and_verification_have_rows() {
    let words = "bench demo-draft -p 0 -n 4 -d 3 -b 1,2 -t 1,2 -r 2 --verify 2,4 -o jsonl";
    let printed = foretoken(&words.split_whitespace().collect::<Vec<_>>());
    assert_eq!(printed.code, 0, "{}", printed.err);
    let rows: Vec<Value> =
        printed.out.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    let names: Vec<&str> = rows.iter().filter_map(|row| row["test"].as_str()).collect();
    let once =
        ["tg4", "tg4 b2", "verify1", "verify2", "verify4"].map(|test| format!("{test} @ d3"));
    assert_eq!(names, [once.clone(), once].concat());
    for row in rows.iter().filter(|row| row["phase"] == "verify") {
        let (cost, rows) = (number(row, "verify_cost"), number(row, "tokens"));
        // Many rows cost more than nothing and, noise aside, less than many steps.
        assert!(cost > 0.0 && cost < 100.0 * rows, "{row}");
        assert_near(row, "tokens_per_second", rows / number(row, "seconds"));
    }
    let threads: Vec<f64> = rows.iter().map(|row| number(row, "threads")).collect();
    assert_eq!(threads, [[1.0; 5], [2.0; 5]].concat());
}

#[test]
fn tables_for_people_and_for_databases() {
    let run = |output: &str| {
        let words =
            ["bench", "demo-draft", "-p", "4", "-n", "2", "-r", "1", "-t", "1", "-o", output];
        let printed = foretoken(&words);
        assert_eq!(printed.code, 0, "{}", printed.err);
        printed.out
    };
    let table = run("md");
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].contains("tok/s") && lines[1].contains("---:"), "{table}");
    assert!(lines[2].contains("pp4") && lines[3].contains("tg2"), "{table}");
    assert!(table.contains("LOUD: none was quiet"), "the words are explained: {table}");
    let csv = run("csv");
    let head = csv.lines().next().expect("a head");
    assert_eq!((csv.lines().count(), head.split(',').next()), (3, Some("version")));
    let sql = run("sql");
    assert!(sql.starts_with("CREATE TABLE IF NOT EXISTS foretoken_bench ("), "{sql}");
    assert_eq!(sql.matches("INSERT INTO foretoken_bench (").count(), 2, "{sql}");
    assert_eq!(sql.matches('\'').count() % 2, 0, "{sql}");
}

#[test]
fn linears_are_measured_alone() {
    let rows =
        json(&["bench", "kernels", "demo-draft", "-r", "1", "--footprint", "8", "-o", "json"]);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["linear"].as_str()).collect();
    assert!(names.starts_with(&["attn.qkv"]) && names.ends_with(&["head"]), "{names:?}");
    for row in &rows {
        let bytes = number(row, "bytes_per_second") * number(row, "seconds");
        let weights = number(row, "n") * number(row, "k") / 2.0;
        assert!(bytes > weights, "4 bits a weight and more: {row}");
        let all = (bytes * number(row, "copies")).round();
        assert!(all >= f64::from(8 << 20), "copies fill the footprint: {row}");
        for rows in [2, 3, 4, 6, 8, 12, 16] {
            assert!(number(row, &format!("cost_{rows}")) > 0.0, "{row}");
        }
    }
}

#[test]
fn mistakes_get_one_sentence() {
    assert_refused(&foretoken(&["bench", "--shape", "gpt-9"]), &["gpt-9", "tinyllama-1.1b"]);
    assert_refused(&foretoken(&["bench", "./nowhere"]), &["./nowhere", "folder"]);
    assert_refused(&foretoken(&["bench", "-p", "0", "-n", "0"]), &["nothing to measure"]);
    let reference = ["bench", "--device", "reference", "-t", "2"];
    assert_refused(&foretoken(&reference), &["--threads", "reference"]);
    for words in [&["-p", "x"][..], &["-b", "0"], &["-t", "0"], &["-r", "0"], &["-o", "xml"]] {
        let printed = foretoken(&[&["bench"], words].concat());
        assert_eq!(printed.code, 2, "{words:?}: {}", printed.err);
        assert!(printed.err.contains(words[0]), "{words:?}: {}", printed.err);
    }
}
