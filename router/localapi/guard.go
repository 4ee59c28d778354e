package localapi

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/internal/disk"
	"ztgate/internal/rate"
	"ztgate/router/control"
	"ztgate/router/fault"
)

const (
	tokenFile   = "authtoken.secret"
	tokenLength = 24 // of a token that we make
	// minToken is how short a token may be: nobody guesses 16 characters, so that
	// the right one never needs to be refused because of wrong ones before it.
	minToken = 16

	// Answers to wrong tokens, for each source.
	wrongEvery = time.Second
	wrongBurst = 10
	maxWrong   = 4096 // sources

	warnEvery = time.Minute
)

// Token returns the token of a home, and makes one if there is none.
func Token(on disk.FS, home string) (string, error) {
	path := filepath.Join(home, tokenFile)
	b, err := on.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		token := newToken()
		return token, atomicfile.WriteOn(on, path, []byte(token), 0o600)
	}
	if err != nil {
		return "", fault.Usagef("read the API's token: %w", err)
	}
	if fi, err := on.Stat(path); err != nil {
		return "", fault.Usagef("read the API's token: %w", err)
	} else if fi.Mode().Perm()&0o007 != 0 {
		return "", fault.Usagef("%s can be read by everybody (mode %04o): chmod 600 %[1]s", path, fi.Mode().Perm())
	}
	token := strings.TrimSpace(string(b))
	if len(token) < minToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fault.Usagef("%s: want at least %d letters and digits: remove the file to get a new token", path, minToken)
	}
	return token, nil
}

// newToken makes one of the reference's form: 24 small letters and digits.
func newToken() string { return strings.ToLower(rand.Text())[:tokenLength] }

// Guard lets requests to a handler pass that come from an allowed address and have the
// token. Browsers can't be made to send one for somebody else: nothing allows other
// origins, and cookies mean nothing.
type Guard struct {
	Count Counts

	next  http.Handler
	from  []netip.Prefix
	log   *slog.Logger
	now   func() time.Time
	token [sha256.Size]byte
	wrong rate.Map[netip.Prefix]
	said  rate.Shared
	quiet atomic.Uint64 // refusals that weren't logged
	start time.Time
}

// Counts are how many requests ended how.
type Counts struct {
	Accepted, WrongAddress, WrongToken, Limited atomic.Uint64
}

// NewGuard returns a guard of next.
func NewGuard(next http.Handler, token string, from []netip.Prefix, log *slog.Logger, now func() time.Time) *Guard {
	return &Guard{next: next, from: from, log: log, now: now, token: sha256.Sum256([]byte(token)), start: now(),
		wrong: rate.Map[netip.Prefix]{Every: wrongEvery, Burst: wrongBurst, Max: maxWrong}}
}

// ServeHTTP implements [http.Handler].
func (g *Guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer") // the token may stand in the address
	from := source(r)
	switch open := r.URL.Path == "/health"; {
	case !g.allowed(from):
		g.Count.WrongAddress.Add(1)
		g.refuse(w, http.StatusUnauthorized, from, "address")
	case open, g.hasToken(r):
		g.Count.Accepted.Add(1)
		g.next.ServeHTTP(w, r)
	case !g.wrong.Take(sourceNetwork(from), g.now()):
		g.Count.Limited.Add(1)
		h.Set("Connection", "close")
		h.Set("Retry-After", "1")
		g.refuse(w, http.StatusTooManyRequests, from, "token")
	default:
		g.Count.WrongToken.Add(1)
		g.refuse(w, http.StatusUnauthorized, from, "token")
	}
}

func (g *Guard) refuse(w http.ResponseWriter, code int, from netip.Addr, what string) {
	if g.said.Take(int64(g.now().Sub(g.start)), 1, warnEvery, 1) {
		g.log.Warn("a request to the API was refused", "from", from, "wrong", what, "left_out", g.quiet.Swap(0))
	} else {
		g.quiet.Add(1)
	}
	control.WriteJSON(w, code, struct{}{})
}

func (g *Guard) allowed(a netip.Addr) bool {
	for _, p := range g.from {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// hasToken looks for the token where the reference does, in its order: the first
// that is there decides.
func (g *Guard) hasToken(r *http.Request) bool {
	given := r.Header.Get("X-ZT1-Auth")
	if given == "" {
		given = r.URL.Query().Get("auth")
	}
	if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok && given == "" {
		given = bearer
	}
	sum := sha256.Sum256([]byte(strings.TrimSpace(given))) // all are of one length
	return subtle.ConstantTimeCompare(sum[:], g.token[:]) == 1
}

// source returns the address that a request comes from; what its headers say of
// others counts for nothing.
func source(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}

// sourceNetwork returns what counts as one source: an address, of IPv6 a /64.
func sourceNetwork(a netip.Addr) netip.Prefix {
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
