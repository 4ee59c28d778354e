package control

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"ztgate/internal/testwait"
)

// TestTooManyConnections: idle and half-sent requests lock nobody out, and a running
// one isn't cut off.
func TestTooManyConnections(t *testing.T) {
	const limit = 8
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	running, finish := make(chan struct{}, limit), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /fast", func(w http.ResponseWriter, _ *http.Request) { WriteJSON(w, http.StatusOK, true) })
	mux.HandleFunc("GET /slow", func(w http.ResponseWriter, _ *http.Request) {
		running <- struct{}{}
		<-finish
		WriteJSON(w, http.StatusOK, true)
	})
	s := NewHTTPServer(mux, limit, 10*time.Second, log.New(io.Discard, "", 0))
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	get := func(path string) error {
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
		resp, err := c.Get("http://" + l.Addr().String() + path)
		if err == nil {
			_ = resp.Body.Close()
		}
		return err
	}
	dial := func(from, text string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		return c
	}
	slow := make(chan error, 1)
	go func() { slow <- get("/slow") }()
	<-running
	lone := dial("127.0.0.3", "GET /fast HTTP/1.1\r\nHost: x\r\n\r\n") // keeps its connection
	if _, err := lone.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		dial("127.0.0.2", []string{"", "GET /fast HTTP/1.1\r\nHost:"}[i%2])
		if i%10 == 0 {
			if err := get("/fast"); err != nil {
				t.Errorf("after %d connections: %v", i+1, err)
			}
		}
	}
	testwait.NoError(t, 5*time.Second, func() error { // the last ones may not have been accepted yet
		if n := s.Turned.Load(); n < 40 {
			return fmt.Errorf("%d connections were closed", n)
		}
		return nil
	})
	s.mu.Lock()
	if n := len(s.open); n > limit {
		t.Errorf("%d connections are open, want at most %d", n, limit)
	}
	s.mu.Unlock()
	// Who holds one keeps it: the other address holds the rest.
	if _, err := io.WriteString(lone, "GET /fast HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Error(err)
	}
	_ = lone.SetReadDeadline(time.Now().Add(5 * time.Second))
	if b, err := io.ReadAll(io.LimitReader(lone, 200)); len(b) < 200 {
		t.Errorf("the connection of another address: %q, %v", b, err)
	}
	finish <- struct{}{}
	if err := <-slow; err != nil {
		t.Errorf("a running request: %v", err)
	}
	// When all are running, one more is turned away at once, and nothing is cut off.
	for range limit {
		go func() { slow <- get("/slow") }()
		<-running
	}
	if err := get("/fast"); err == nil {
		t.Error("one more than the limit was served")
	}
	close(finish)
	for range limit {
		if err := <-slow; err != nil {
			t.Errorf("a running request: %v", err)
		}
	}
	testwait.NoError(t, 5*time.Second, func() error { return get("/fast") })
}

// TestSlowRequests: whoever sends a request slowly, or doesn't take the answer, is cut off.
func TestSlowRequests(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	large := make([]byte, 64<<20) // beyond what the kernel takes
	ends := make(chan error, 4)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /body", func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		ends <- err
	})
	mux.HandleFunc("GET /large", func(w http.ResponseWriter, _ *http.Request) {
		_, err := w.Write(large)
		ends <- err
	})
	s := NewHTTPServer(mux, 8, 3*time.Second, log.New(io.Discard, "", 0))
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	for name, tt := range map[string]struct {
		text   string
		within bool // the handler is asked, and its reading or writing fails
		reads  bool
	}{
		"nothing":    {"", false, true},
		"head":       {"GET /large HTTP/1.1\r\nHost: x\r\nX-A: ", false, true},
		"body":       {"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx", true, true},
		"the answer": {"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, tt.text); err != nil {
				t.Fatal(err)
			}
			if tt.reads {
				_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("the connection stays")
				}
			}
			if !tt.within {
				return
			}
			select {
			case err := <-ends:
				if err == nil {
					t.Error("it was carried to its end")
				}
			case <-time.After(20 * time.Second):
				t.Error("the request stays")
			}
		})
	}
}

// TestLargeRequest: a body has a bound.
func TestLargeRequest(t *testing.T) {
	read := 0
	h := Answer(func(r *http.Request) (any, error) {
		b, err := io.ReadAll(r.Body)
		read = len(b)
		return nil, err
	})
	w := httptest.NewRecorder()
	h(w, httptest.NewRequest("POST", "/", io.LimitReader(zeros{}, 100<<20)))
	if w.Code == http.StatusOK || read > 4<<20 {
		t.Errorf("code %d, %d bytes read", w.Code, read)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
