package resolver

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Dial opens a socket to a name server: network is udp or tcp. Each question has one of
// its own, so that its port is another each time.
type Dial func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error)

const (
	headerSize = 12
	// udpSize is what we take by UDP, and send at most: it passes without fragments
	// everywhere.
	udpSize = 1232
	// maxForged datagrams that are no answer to our question are read; then TCP, where
	// nobody else can answer, is asked.
	maxForged = 64
	maxName   = 255 // bytes
)

var (
	errForged   = errors.New("answers that don't fit the question")
	errNoAnswer = errors.New("no answer in time")
	errBad      = errors.New("a malformed answer")
	errNoServer = errors.New("the network doesn't work, or has no route to its name servers")
)

// Query is a question to name servers.
type Query struct {
	Name             string // with the dot at its end
	Type             uint16
	EDNS, DNSSEC, CD bool // said by the client: it has EDNS, wants signatures, does the checking itself
}

// Ask asks one server. By UDP it returns an answer that was cut, too. Names in the
// answer have the case of the question.
func Ask(ctx context.Context, dial Dial, network string, server netip.AddrPort, q Query) (*dns.Msg, error) {
	request, question, err := q.pack()
	if err != nil {
		return nil, err
	}
	b, err := exchange(ctx, dial, network, server, request)
	if network == "udp" && errors.Is(err, errForged) {
		b, err = exchange(ctx, dial, "tcp", server, request)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errNoAnswer
		}
		return nil, err
	}
	copy(b[headerSize:], question)
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil || len(m.Question) != 1 {
		return nil, errBad
	}
	for _, rr := range slices.Concat(m.Answer, m.Ns, m.Extra) { // those that don't point to the question
		if h := rr.Header(); strings.EqualFold(h.Name, q.Name) {
			h.Name = q.Name
		}
	}
	return m, nil
}

// pack returns the request, and the question in it as the client wrote it. The
// request's ID and the case of its letters are random, which who doesn't see it has to
// guess.
func (q Query) pack() (request, question []byte, err error) {
	m := &dns.Msg{MsgHdr: dns.MsgHdr{RecursionDesired: true, CheckingDisabled: q.CD},
		Question: []dns.Question{{Name: q.Name, Qtype: q.Type, Qclass: dns.ClassINET}}}
	if q.EDNS {
		m.SetEdns0(udpSize, q.DNSSEC)
	}
	if request, err = m.Pack(); err != nil {
		return nil, nil, err
	}
	n := questionEnd(request)
	if n == 0 {
		return nil, nil, errBad
	}
	question = bytes.Clone(request[headerSize:n])
	random := make([]byte, 2+maxName)
	_, _ = rand.Read(random) // doesn't fail
	copy(request, random[:2])
	name := request[headerSize : n-4]
	for i := 0; i < len(name); i += 1 + int(name[i]) { // labels
		for j := i + 1; j <= i+int(name[i]); j++ {
			if c := name[j] | 0x20; c >= 'a' && c <= 'z' {
				name[j] ^= random[2+j] & 0x20
			}
		}
	}
	return request, question, nil
}

// questionEnd returns where the only question of a message ends, 0 if it has none that
// is whole and written without pointers.
func questionEnd(b []byte) int {
	if len(b) < headerSize || binary.BigEndian.Uint16(b[4:]) != 1 {
		return 0
	}
	at := headerSize
	for at < len(b) && b[at] != 0 {
		if b[at] > 63 || at+1+int(b[at]) > headerSize+maxName-1 {
			return 0
		}
		at += 1 + int(b[at])
	}
	if at+5 > len(b) {
		return 0
	}
	return at + 5
}

// match is how well a message fits a request.
type match int

const (
	foreign match = iota
	folded        // but for the case of letters: from a server that doesn't keep it, or from somebody who guesses
	fits
)

// compare holds an answer against a request.
func compare(answer, request []byte) match {
	end := questionEnd(answer)
	if end == 0 || end != questionEnd(request) || answer[0] != request[0] || answer[1] != request[1] || answer[2]&0x80 == 0 {
		return foreign
	}
	got, want := answer[headerSize:end], request[headerSize:end]
	switch {
	case bytes.Equal(got, want):
		return fits
	case bytes.Equal(got[len(got)-4:], want[len(want)-4:]) && bytes.EqualFold(got, want):
		return folded
	}
	return foreign
}

// exchange sends a request and returns the answer. Over a stream the case of letters
// doesn't matter.
func exchange(ctx context.Context, dial Dial, network string, server netip.AddrPort, request []byte) ([]byte, error) {
	c, err := dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		if err := writeStream(c, request); err != nil {
			return nil, err
		}
		b, err := readStream(c, make([]byte, dns.MaxMsgSize))
		if err == nil && compare(b, request) == foreign {
			err = errForged
		}
		return b, err
	}
	if _, err := c.Write(request); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	for range maxForged {
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		switch compare(b[:n], request) {
		case fits:
			return b[:n], nil
		case folded:
			return nil, errForged
		}
	}
	return nil, errForged
}

// writeStream writes a message as TCP carries it.
func writeStream(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...))
	return err
}

var errTooLarge = errors.New("a message larger than it may be")

// readStream reads a message as TCP carries it into b.
func readStream(r io.Reader, b []byte) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > len(b) {
		return nil, errTooLarge
	}
	_, err := io.ReadFull(r, b[:n])
	return b[:n], err
}
