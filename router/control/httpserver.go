package control

import (
	"context"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// headerTimeout is how long a client may take for its question, which every one
	// sends at once.
	headerTimeout = 2 * time.Second
	maxHeader     = 8 << 10
)

// HTTPServer is an HTTP server with a bound on its connections. One that comes when
// there are too many takes the place of another that has no request running: the
// oldest of the address that holds most. So slow and idle ones lock nobody out.
type HTTPServer struct {
	http.Server
	Turned atomic.Uint64 // connections closed for the bound

	max  int
	mu   sync.Mutex // guards what follows
	seq  uint64
	open map[net.Conn]*httpConn
}

// httpConn is an open connection.
type httpConn struct {
	from string // address without the port
	busy bool   // a request is answered
	seq  uint64 // of its start, or of the end of its last request
}

type connKey struct{}

// NewHTTPServer returns a server for at most so many connections. A request may take
// the time that timeout gives it, from its first byte to the last of the answer.
func NewHTTPServer(h http.Handler, limit int, timeout time.Duration, complaints *log.Logger) *HTTPServer {
	s := &HTTPServer{max: limit, open: map[net.Conn]*httpConn{}}
	s.Server = http.Server{Handler: s.mark(h), ReadHeaderTimeout: headerTimeout, ReadTimeout: timeout, WriteTimeout: timeout,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: complaints,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			s.add(c)
			return context.WithValue(ctx, connKey{}, c)
		},
		ConnState: func(c net.Conn, st http.ConnState) {
			if st == http.StateClosed || st == http.StateHijacked {
				s.remove(c)
			}
		}}
	return s
}

// mark notes which connections have a request running.
func (s *HTTPServer) mark(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, _ := r.Context().Value(connKey{}).(net.Conn)
		s.setBusy(c, true)
		defer s.setBusy(c, false)
		h.ServeHTTP(w, r)
	})
}

func (s *HTTPServer) setBusy(c net.Conn, busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.open[c]; x != nil {
		s.seq++
		x.busy, x.seq = busy, s.seq
	}
}

// add takes a new connection, or closes it if all others are busy.
func (s *HTTPServer) add(c net.Conn) {
	from := ""
	if host, _, err := net.SplitHostPort(c.RemoteAddr().String()); err == nil {
		from = host
	}
	s.mu.Lock()
	gone := c
	if len(s.open) < s.max {
		gone = nil
	} else if v := s.victim(); v != nil {
		gone = v
		delete(s.open, v)
	}
	if gone != c {
		s.seq++
		s.open[c] = &httpConn{from: from, seq: s.seq}
	}
	s.mu.Unlock()
	if gone != nil {
		s.Turned.Add(1)
		_ = gone.Close()
	}
}

func (s *HTTPServer) remove(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

// victim returns the connection that gives way, nil if all are busy.
func (s *HTTPServer) victim() (found net.Conn) {
	held := map[string]int{}
	for _, x := range s.open {
		held[x.from]++
	}
	var best *httpConn
	for c, x := range s.open {
		switch {
		case x.busy:
		case best == nil || held[x.from] > held[best.from] || held[x.from] == held[best.from] && x.seq < best.seq:
			found, best = c, x
		}
	}
	return found
}
