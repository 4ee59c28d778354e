package vl2

import (
	"bytes"
	"fmt"
	"strconv"

	"ztgate/zerotier/identity"
)

// Dictionary is the key=value text of requests and configurations (chapter 03
// §2.1). The first of several equal keys counts.
type Dictionary map[string][]byte

// ParseDictionary reads a dictionary; nothing is an error.
func ParseDictionary(b []byte) Dictionary {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	d := make(Dictionary)
	for len(b) > 0 {
		line := b
		if i := bytes.IndexAny(b, "\r\n"); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		key, value, ok := bytes.Cut(line, []byte{'='})
		if !ok {
			continue
		}
		if _, dup := d[string(key)]; !dup {
			d[string(key)] = unescape(value)
		}
	}
	return d
}

func unescape(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		c := b[i]
		if c == '\\' {
			if i++; i == len(b) {
				break
			}
			switch c = b[i]; c {
			case '0':
				c = 0
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 'e':
				c = '='
			}
		}
		out = append(out, c)
	}
	return out
}

// dictWriter writes a dictionary in order.
type dictWriter struct{ b []byte }

func (w *dictWriter) blob(key string, value []byte) {
	if len(w.b) > 0 {
		w.b = append(w.b, '\n')
	}
	w.b = append(append(w.b, key...), '=')
	for _, c := range value {
		switch c {
		case 0:
			w.b = append(w.b, '\\', '0')
		case '\n':
			w.b = append(w.b, '\\', 'n')
		case '\r':
			w.b = append(w.b, '\\', 'r')
		case '=':
			w.b = append(w.b, '\\', 'e')
		case '\\':
			w.b = append(w.b, '\\', '\\')
		default:
			w.b = append(w.b, c)
		}
	}
}

func (w *dictWriter) text(key, value string) { w.blob(key, []byte(value)) }

func (w *dictWriter) integer(key string, v uint64) { w.text(key, fmt.Sprintf("%016x", v)) }

func (w *dictWriter) boolean(key string, v bool) {
	if v {
		w.text(key, "1")
	} else {
		w.text(key, "0")
	}
}

func (w *dictWriter) address(key string, a identity.Address) { w.text(key, a.String()) }

// Text returns a value as text.
func (d Dictionary) Text(key string) string { return string(d[key]) }

// Integer returns a hexadecimal value, def if the key is absent or empty. It
// saturates, and stops at the first byte that isn't a digit.
func (d Dictionary) Integer(key string, def uint64) uint64 {
	s := bytes.TrimLeft(d[key], " \t\v\f+")
	if len(d[key]) == 0 {
		return def
	}
	if len(s) > 1 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') {
		s = s[2:]
	}
	n := 0
	for n < len(s) && (s[n] >= '0' && s[n] <= '9' || s[n] >= 'a' && s[n] <= 'f' || s[n] >= 'A' && s[n] <= 'F') {
		n++
	}
	if n == 0 {
		return 0
	}
	v, err := strconv.ParseUint(string(s[:n]), 16, 64)
	if err != nil {
		return 1<<64 - 1
	}
	return v
}

// Boolean reports whether the value begins with 1 or t.
func (d Dictionary) Boolean(key string) bool {
	v := d[key]
	return len(v) > 0 && (v[0] == '1' || v[0] == 't' || v[0] == 'T')
}
