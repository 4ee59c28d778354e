package control

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
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
