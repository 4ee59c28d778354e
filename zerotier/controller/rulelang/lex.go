package rulelang

import (
	"fmt"
	"strings"
)

// Error is a fault in a source, at a line and column from 1 (0 = the whole).
type Error struct {
	Line, Column int
	Message      string
}

// Error implements error.
func (e *Error) Error() string {
	if e.Line == 0 {
		return "rules: " + e.Message
	}
	return fmt.Sprintf("rules: line %d, column %d: %s", e.Line, e.Column, e.Message)
}

// word is a token: something without blanks, or ";".
type word struct {
	text      string
	line, col int
}

func (w word) fail(format string, args ...any) error {
	return &Error{w.line, w.col, fmt.Sprintf(format, args...)}
}

// lower is the word as a keyword or name: they are compared without case.
func (w word) lower() string { return strings.ToLower(w.text) }

// split cuts a source into words. A comment goes from a # at the start of a word to
// the end of the line. Blanks inside the parentheses of a word are dropped.
func split(src string) (out []word) {
	var cur strings.Builder
	var at word
	line, col, depth := 1, 0, 0
	comment := false
	flush := func() {
		if cur.Len() > 0 {
			out = append(out, word{cur.String(), at.line, at.col})
			cur.Reset()
		}
		depth = 0
	}
	for _, c := range src {
		col++
		switch {
		case c == '\n':
			if comment = false; depth == 0 {
				flush()
			}
			line, col = line+1, 0
		case comment:
		case c == ' ', c == '\t', c == '\r':
			if depth == 0 {
				flush()
			}
		case c == '#' && (cur.Len() == 0 || depth > 0):
			comment = true
		case c == ';':
			flush()
			out = append(out, word{";", line, col})
		default:
			if cur.Len() == 0 {
				at = word{line: line, col: col}
			}
			switch c {
			case '(':
				depth++
			case ')':
				depth = max(depth-1, 0)
			}
			cur.WriteRune(c)
		}
	}
	flush()
	return out
}
