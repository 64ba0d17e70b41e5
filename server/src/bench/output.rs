//! Rows of figures as Markdown, CSV, JSON, JSON lines or SQL, each written as soon as it is known.
//!
//! A row is a JSON object with the keys of its table's columns. Not here: what the figures are.

use crate::Io;
use crate::cli::OutputFormat;
use serde_json::{Map, Value};

/// A row.
pub(crate) type Row = Map<String, Value>;

/// A kind of rows.
#[derive(Debug)]
pub(crate) struct Table {
    /// Name of the SQL table.
    pub(crate) name: &'static str,
    /// Every key of a row in order, with its SQL type, in groups.
    pub(crate) columns: &'static [&'static [(&'static str, &'static str)]],
    /// What people see.
    pub(crate) cells: &'static [Cell],
    /// Lines below the Markdown table that say what its words mean.
    pub(crate) legend: &'static str,
}

impl Table {
    /// All columns.
    pub(crate) fn columns(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        self.columns.iter().copied().flatten()
    }
}

/// A column of the Markdown table.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) title: &'static str,
    /// Characters it is padded to.
    pub(crate) width: usize,
    pub(crate) right: bool,
    pub(crate) text: fn(&Row) -> String,
}

/// Writes the rows of one table.
#[derive(Debug)]
pub(crate) struct Writer {
    table: &'static Table,
    format: OutputFormat,
    rows: usize,
}

impl Writer {
    pub(crate) fn new(table: &'static Table, format: OutputFormat) -> Self {
        Self { table, format, rows: 0 }
    }

    /// Writes one row, after the head of the table if it is the first.
    pub(crate) fn row(&mut self, row: &Row, io: &mut Io<'_>) -> std::io::Result<()> {
        let first = self.rows == 0;
        self.rows += 1;
        let head = if first { self.head() } else { String::new() };
        let line = match self.format {
            OutputFormat::Md => self.markdown(|cell| (cell.text)(row)),
            OutputFormat::Csv => csv(self.values(row).map(text)),
            OutputFormat::Json => format!("{}{}", if first { "" } else { ",\n" }, object(row)),
            OutputFormat::Jsonl => object(row) + "\n",
            OutputFormat::Sql => self.insert(row),
        };
        write!(io.out, "{head}{line}")?;
        io.out.flush()
    }

    /// Writes what comes after the last row.
    pub(crate) fn finish(self, io: &mut Io<'_>) -> std::io::Result<()> {
        match self.format {
            OutputFormat::Md => writeln!(io.out, "\n{}", self.table.legend),
            OutputFormat::Json if self.rows == 0 => writeln!(io.out, "[]"),
            OutputFormat::Json => writeln!(io.out, "\n]"),
            OutputFormat::Csv | OutputFormat::Jsonl | OutputFormat::Sql => Ok(()),
        }
    }

    fn head(&self) -> String {
        let columns = self.table.columns();
        match self.format {
            OutputFormat::Md => {
                let rule = |cell: &Cell| {
                    let dashes = "-".repeat(cell.width - 1);
                    if cell.right { dashes + ":" } else { dashes + "-" }
                };
                self.markdown(|cell| cell.title.to_owned()) + &self.markdown(rule)
            }
            OutputFormat::Csv => csv(columns.map(|(key, _)| (*key).to_owned())),
            OutputFormat::Json => "[\n".to_owned(),
            OutputFormat::Jsonl => String::new(),
            OutputFormat::Sql => {
                let all: Vec<String> = columns.map(|(key, t)| format!("  {key} {t}")).collect();
                let name = self.table.name;
                format!("CREATE TABLE IF NOT EXISTS {name} (\n{}\n);\n", all.join(",\n"))
            }
        }
    }

    fn markdown(&self, text: impl Fn(&Cell) -> String) -> String {
        let cell = |cell: &Cell| {
            let (text, width) = (text(cell).replace('|', "/"), cell.width);
            if cell.right { format!(" {text:>width$} |") } else { format!(" {text:<width$} |") }
        };
        format!("|{}\n", self.table.cells.iter().map(cell).collect::<String>())
    }

    /// The values of a row in the order of the columns.
    fn values<'a>(&self, row: &'a Row) -> impl Iterator<Item = &'a Value> {
        self.table.columns().map(|(key, _)| row.get(*key).unwrap_or(&Value::Null))
    }

    fn insert(&self, row: &Row) -> String {
        let keys: Vec<&str> = self.table.columns().map(|(key, _)| *key).collect();
        let values: Vec<String> = self.values(row).map(sql).collect();
        let (name, keys, values) = (self.table.name, keys.join(", "), values.join(", "));
        format!("INSERT INTO {name} ({keys}) VALUES ({values});\n")
    }
}

fn object(row: &Row) -> String {
    Value::Object(row.clone()).to_string()
}

/// A value as plain text: nothing for null, the numbers of a list with spaces between.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

/// A line of comma separated fields, quoted where they need it.
fn csv(fields: impl Iterator<Item = String>) -> String {
    let quoted = |field: String| match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field,
    };
    fields.map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

/// A literal of standard SQL.
fn sql(value: &Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Bool(truth) => u8::from(*truth).to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(_) | Value::Array(_) | Value::Object(_) => {
            format!("'{}'", text(value).replace('\'', "''"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    static TABLE: Table = Table {
        name: "test",
        columns: &[
            &[("name", "TEXT"), ("count", "INTEGER")],
            &[("ok", "INTEGER"), ("all", "TEXT")],
        ],
        cells: &[
            Cell { title: "name", width: 6, right: false, text: |row| text(&row["name"]) },
            Cell { title: "n", width: 4, right: true, text: |row| text(&row["count"]) },
        ],
        legend: "n: how many.",
    };

    fn written(format: OutputFormat, rows: &[Value]) -> String {
        let (mut out, mut err) = (vec![], vec![]);
        let mut io = Io {
            out: &mut out,
            err: &mut err,
            input: &mut std::io::empty(),
            out_is_terminal: false,
            err_is_terminal: false,
            input_is_terminal: true,
        };
        let mut writer = Writer::new(&TABLE, format);
        for row in rows {
            writer.row(row.as_object().unwrap(), &mut io).unwrap();
        }
        writer.finish(&mut io).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn rows() -> [Value; 2] {
        let tricky = "it's a \"name\", with | all;";
        [
            json!({"name": "plain", "count": 3, "ok": true, "all": [1.5, 2.0]}),
            json!({"name": tricky, "count": null, "ok": false, "all": []}),
        ]
    }

    #[test]
    fn json_and_its_lines_give_the_rows_back() {
        let all = written(OutputFormat::Json, &rows());
        assert_eq!(serde_json::from_str::<Vec<Value>>(&all).unwrap(), rows());
        let lines = written(OutputFormat::Jsonl, &rows());
        let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines, rows());
        assert_eq!(
            serde_json::from_str::<Vec<Value>>(&written(OutputFormat::Json, &[])).unwrap(),
            [] as [Value; 0]
        );
    }

    /// Fields of a line, by the rules of RFC 4180.
    fn fields(line: &str) -> Vec<String> {
        let (mut all, mut quoted) = (vec![String::new()], false);
        for part in line.split('"').enumerate().map(|(i, part)| (i % 2 == 1, part)) {
            // An empty part between two quoted ones was a doubled quote.
            if quoted && !part.0 && part.1.is_empty() {
                all.last_mut().unwrap().push('"');
            } else if part.0 {
                all.last_mut().unwrap().push_str(part.1);
            } else {
                let mut pieces = part.1.split(',');
                all.last_mut().unwrap().push_str(pieces.next().unwrap());
                all.extend(pieces.map(str::to_owned));
            }
            quoted = part.0;
        }
        all
    }

    #[test]
    fn csv_lines_have_a_field_for_each_column() {
        let all = written(OutputFormat::Csv, &rows());
        let lines: Vec<Vec<String>> = all.lines().map(fields).collect();
        assert_eq!(lines[0], ["name", "count", "ok", "all"]);
        assert_eq!(lines[1], ["plain", "3", "true", "1.5 2.0"]);
        assert_eq!(lines[2][0], "it's a \"name\", with | all;");
        assert!(lines.iter().all(|fields| fields.len() == 4), "{all}");
    }

    #[test]
    fn sql_statements_are_whole() {
        let all = written(OutputFormat::Sql, &rows());
        assert!(all.starts_with("CREATE TABLE IF NOT EXISTS test (\n  name TEXT,\n"), "{all}");
        let inserts: Vec<&str> = all.lines().filter(|l| l.starts_with("INSERT")).collect();
        assert_eq!(
            inserts[0],
            "INSERT INTO test (name, count, ok, all) VALUES ('plain', 3, 1, '1.5 2.0');"
        );
        assert!(inserts[1].contains("('it''s a \"name\", with | all;', NULL, 0, '')"), "{all}");
        assert_eq!(all.matches('\'').count() % 2, 0, "{all}");
        assert_eq!(all.matches('(').count(), all.matches(')').count());
    }

    #[test]
    fn markdown_has_a_head_a_rule_and_equal_columns() {
        let all = written(OutputFormat::Md, &rows());
        let lines: Vec<&str> = all.lines().collect();
        assert_eq!(lines[0], "| name   |    n |");
        assert_eq!(lines[1], "| ------ | ---: |");
        assert_eq!(lines[2], "| plain  |    3 |");
        assert_eq!(lines[3].matches('|').count(), 3, "{all}");
        assert_eq!(lines.last(), Some(&"n: how many."));
    }
}
