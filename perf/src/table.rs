//! The table for people.

use crate::row::Row;

const HEAD: [&str; 8] = ["figure", "value", "unit", "peer", "peer value", "ratio", "spread", "runs"];
/// Columns of words; the others hold numbers and are aligned to the right.
const LEFT: [bool; 8] = [true, false, true, true, false, false, false, false];

/// The rows under a head line, columns aligned, with a line that says how to read them.
#[must_use]
pub fn render(rows: &[Row]) -> String {
    let mut cells = vec![HEAD.map(str::to_owned)];
    cells.extend(rows.iter().map(row_cells));
    let width = |column: usize| {
        let widths = cells.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &cells {
        let mut shown = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            if LEFT[column] {
                shown += &format!("{cell:<width$}  ");
            } else {
                shown += &format!("{cell:>width$}  ");
            }
        }
        text += shown.trim_end();
        text.push('\n');
    }
    text += "ratio: above 1 means that we are better; spread: interquartile range by median\n";
    text
}

fn row_cells(row: &Row) -> [String; 8] {
    let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    [
        row.id.clone(),
        number(row.value),
        row.unit.clone(),
        row.peer.clone().unwrap_or_else(|| "-".to_owned()),
        optional(row.peer_value),
        optional(row.ratio),
        format!("{:.1} %", row.spread * 100.0),
        row.runs.to_string(),
    ]
}

/// Three digits at least, no exponent.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let row = |id: &str, value, peer: Option<&str>| Row {
            id: id.to_owned(),
            value,
            unit: "us".to_owned(),
            peer: peer.map(str::to_owned),
            peer_value: peer.map(|_| 12.34),
            ratio: peer.map(|_| 0.5),
            runs: 15,
            spread: 0.0123,
            commit: String::new(),
            smoke: false,
        };
        let text = render(&[row("long.name", 1234.5, None), row("b", 24.68, Some("memcpy"))]);
        let expected = "\
figure     value  unit  peer    peer value  ratio  spread  runs
long.name   1234  us    -                -      -   1.2 %    15
b           24.7  us    memcpy        12.3  0.500   1.2 %    15
ratio: above 1 means that we are better; spread: interquartile range by median
";
        assert_eq!(text, expected);
    }
}
