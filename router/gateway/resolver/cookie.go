package resolver

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

const (
	clientCookie = 8  // bytes
	serverCookie = 16 // of which the time are 8
	cookieLife   = time.Hour
)

// cookies prove that a client has the address that its datagram came from (RFC 7873).
type cookies struct{ secret [32]byte }

func newCookies() *cookies {
	c := &cookies{}
	_, _ = rand.Read(c.secret[:]) // doesn't fail
	return c
}

// make returns the server's part for a client.
func (c *cookies) make(client []byte, from netip.Addr, now time.Time) []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(now.Unix()))
	h := hmac.New(sha256.New, c.secret[:])
	h.Write(client)
	h.Write(b)
	a := from.As16()
	h.Write(a[:])
	return h.Sum(b)[:serverCookie]
}

// look reads the cookie of a query. It returns the one to answer with, nil for none,
// whether the client has proven its address, and false for a malformed one.
func (c *cookies) look(opt *dns.OPT, from netip.Addr, now time.Time) (answer *dns.EDNS0_COOKIE, proven, ok bool) {
	for _, o := range opt.Option {
		given, is := o.(*dns.EDNS0_COOKIE)
		if !is {
			continue
		}
		b, err := hex.DecodeString(given.Cookie)
		if err != nil || len(b) != clientCookie && (len(b) < clientCookie+8 || len(b) > clientCookie+32) {
			return nil, false, false
		}
		client, server := b[:clientCookie], b[clientCookie:]
		if len(server) == serverCookie {
			made := time.Unix(int64(binary.BigEndian.Uint64(server)), 0)
			proven = now.Sub(made).Abs() < cookieLife && hmac.Equal(server, c.make(client, from, made))
		}
		return &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: hex.EncodeToString(append(client[:clientCookie:clientCookie], c.make(client, from, now)...))}, proven, true
	}
	return nil, false, true
}
