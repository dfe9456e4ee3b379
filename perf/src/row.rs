//! One figure, as it is stored.

use serde::{Deserialize, Serialize};

/// One figure. Serialised as one line of `results.ndjson`; fields keep their order there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Names the figure for all time, dotted: `log.commit_p50`.
    pub id: String,
    /// Ours: the median of the runs.
    pub value: f64,
    /// The unit of both values: `us`, `GB/s`, `1/s`.
    pub unit: String,
    /// What it was compared with, if anything.
    pub peer: Option<String>,
    /// The peer's median.
    pub peer_value: Option<f64>,
    /// How much better we are: above 1 always means that we are better, whichever way the unit points. The
    /// median over the pairs of neighbouring runs, so it may differ a little from the quotient of the medians.
    pub ratio: Option<f64>,
    /// How often each side was measured.
    pub runs: usize,
    /// Interquartile range by median, of the ratio if there is one, otherwise of the value. 0.05: half of all
    /// runs lie within 5 %.
    pub spread: f64,
    /// The commit that was measured, with `+dirty` if files differ from it.
    pub commit: String,
    /// From a smoke run: the figures mean nothing. Absent otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub smoke: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            id: "a.b".to_owned(),
            value: 2.5,
            unit: "us".to_owned(),
            peer: None,
            peer_value: None,
            ratio: None,
            runs: 3,
            spread: 0.0,
            commit: "0123456789ab".to_owned(),
            smoke: false,
        }
    }

    #[test]
    fn a_row_without_a_peer_has_nulls_in_the_agreed_order() {
        let json = serde_json::to_string(&row()).unwrap();
        assert_eq!(
            json,
            r#"{"id":"a.b","value":2.5,"unit":"us","peer":null,"peer_value":null,"ratio":null,"runs":3,"spread":0.0,"commit":"0123456789ab"}"#
        );
    }

    #[test]
    fn only_smoke_rows_say_so_and_all_come_back() {
        let smoke =
            Row { smoke: true, peer: Some("memcpy".to_owned()), peer_value: Some(5.0), ratio: Some(2.0), ..row() };
        for row in [row(), smoke] {
            let json = serde_json::to_string(&row).unwrap();
            assert_eq!(json.contains("smoke"), row.smoke, "{json}");
            assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
        }
    }
}
