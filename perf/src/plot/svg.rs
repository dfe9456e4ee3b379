//! The few SVG elements that plots are made of.

use std::fmt::Write;

/// Colours that people with any colour vision can tell apart (Okabe and Ito), darkest first.
pub const COLOURS: [&str; 7] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
/// Axes and their labels.
pub const INK: &str = "#333333";
/// Lines behind the data.
pub const GRID: &str = "#E3E3E3";

/// Where a text stands relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// It is centred there.
    Middle,
    /// It ends there.
    End,
}

/// A drawing in the making. Coordinates are in pixels from the top left corner.
#[derive(Debug)]
pub struct Drawing {
    body: String,
    width: f64,
    height: f64,
}

impl Drawing {
    /// A white sheet.
    #[must_use]
    pub fn new(width: f64, height: f64) -> Drawing {
        Drawing { body: String::new(), width, height }
    }

    /// A straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.element(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="{width}"/>"#
        ));
    }

    /// A line that is interrupted.
    pub fn dashes(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.element(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="1.2" stroke-dasharray="5 4"/>"#
        ));
    }

    /// Straight lines from point to point.
    pub fn path(&mut self, points: &[(f64, f64)], colour: &str) {
        let mut listed = String::new();
        for (x, y) in points {
            write!(listed, "{x:.1},{y:.1} ").expect("a string takes everything");
        }
        self.element(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>"#,
            listed.trim_end()
        ));
    }

    /// A filled circle.
    pub fn dot(&mut self, (x, y): (f64, f64), radius: f64, colour: &str) {
        self.element(format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" fill="{colour}"/>"#));
    }

    /// A filled rectangle.
    pub fn rectangle(&mut self, (x, y): (f64, f64), width: f64, height: f64, colour: &str) {
        self.element(format_args!(
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        ));
    }

    /// A text of one line.
    pub fn text(&mut self, (x, y): (f64, f64), size: f64, anchor: Anchor, text: &str) {
        self.written(format_args!(r#"x="{x:.1}" y="{y:.1}""#), size, anchor, text);
    }

    /// A title.
    pub fn bold(&mut self, (x, y): (f64, f64), size: f64, text: &str) {
        self.written(format_args!(r#"x="{x:.1}" y="{y:.1}" font-weight="bold""#), size, Anchor::Start, text);
    }

    /// A text that reads from the bottom to the top, centred.
    pub fn upwards(&mut self, (x, y): (f64, f64), size: f64, text: &str) {
        self.written(format_args!(r#"transform="translate({x:.1} {y:.1}) rotate(-90)""#), size, Anchor::Middle, text);
    }

    fn written(&mut self, attributes: std::fmt::Arguments<'_>, size: f64, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.element(format_args!(
            r#"<text {attributes} font-size="{size}" text-anchor="{anchor}" fill="{INK}">{text}</text>"#
        ));
    }

    fn element(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.body, "{element}").expect("a string takes everything");
    }

    /// The file.
    #[must_use]
    pub fn finish(self) -> String {
        let Drawing { body, width, height } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
        )
    }
}

/// Text as it may stand in XML.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            // XML has no other control characters.
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// About how wide a text of that size is, in pixels: for placing what comes after it.
#[must_use]
pub fn text_width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * 0.56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_cannot_break_the_file() {
        let mut drawing = Drawing::new(100.0, 50.0);
        drawing.text((1.0, 2.0), 12.0, Anchor::End, "a<b & \"c\"\n");
        let text = drawing.finish();
        assert!(text.contains(r#">a&lt;b &amp; &quot;c&quot; </text>"#), "{text}");
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        assert_eq!(text.matches('<').count(), text.matches('>').count());
    }
}
