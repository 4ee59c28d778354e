package ztnode

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestTextFromNetwork(t *testing.T) {
	long := strings.Repeat("ü", 300)
	for text, want := range map[string]string{
		"":                           "",
		"Büro 東京 (2nd floor)":        "Büro 東京 (2nd floor)",
		"red\x1b[31m":                "red?[31m",
		"two\r\nlines\ttab\x00":      "two??lines?tab?",
		"exe\u202egnp.\u2066x":       "exe?gnp.?x",
		"zero\u200bwidth\ufeff":      "zero?width?",
		"line\u2028separator":        "line?separator",
		"C1\u009b31m":                "C1?31m",
		"bad\xff\xc3utf":             "bad??utf",
		"no-break\u00a0space":        "no-break?space",
		long:                         long[:252] + "...",
		strings.Repeat("a", 255):     strings.Repeat("a", 255),
		strings.Repeat("\x1b", 3000): strings.Repeat("?", 252) + "...",
	} {
		got := Text(text)
		if got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
		if !utf8.ValidString(got) || len(got) > MaxText || Text(got) != got {
			t.Errorf("%q is shown as %q: invalid, too long, or changed when shown again", text, got)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("office\x1b\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		got := Text(s)
		if !utf8.ValidString(got) || len(got) > MaxText || Text(got) != got || strings.ContainsAny(got, "\x1b\r\n\u202e") {
			t.Errorf("%q is shown as %q", s, got)
		}
	})
}
