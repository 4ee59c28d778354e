package ztnode

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxText bounds a text from the network, in bytes, and maxURL one that is to be
// followed.
const (
	MaxText = 255
	maxURL  = 2048
)

// Printable makes a text fit to be shown anywhere, on one line: in a terminal, a log
// or a page. What isn't printable, like control characters and those that turn the
// direction of writing, becomes '?', and so does what isn't UTF-8.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// Text is [Printable] for a text that somebody on the network chose: what is too
// long is cut.
func Text(s string) string { return text(s, MaxText) }

func text(s string, most int) string {
	if len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return s
	}
	clean := Printable(s[:min(len(s), 4*most)])
	if len(clean) <= most {
		return clean
	}
	end := most - len("...")
	for !utf8.RuneStart(clean[end]) {
		end--
	}
	return clean[:end] + "..."
}

// Clean returns the network with texts that are fit to be shown.
func (n Network) Clean() Network {
	n.Name, n.DNSDomain, n.AuthURL = Text(n.Name), Text(n.DNSDomain), text(n.AuthURL, maxURL)
	n.Status, n.Type = Text(n.Status), Text(n.Type)
	return n
}

// Clean returns the peer with texts that are fit to be shown.
func (p Peer) Clean() Peer {
	p.Address, p.Role, p.Version = Text(p.Address), Text(p.Role), Text(p.Version)
	return p
}

// Clean returns the moon with texts that are fit to be shown.
func (m Moon) Clean() Moon {
	m.Seed = Text(m.Seed)
	roots := make([]PlanetRoot, len(m.Roots))
	for i, r := range m.Roots {
		r.Address, r.Identity = Text(r.Address), Text(r.Identity)
		roots[i] = r
	}
	m.Roots = roots
	return m
}
