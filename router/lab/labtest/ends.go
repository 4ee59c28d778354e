package labtest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
)

const patience = 10 * time.Second

// file fits into buffers, and is read in more than one piece.
var file = bytes.Repeat([]byte("0123456789abcdef"), 1<<12)

// Ends tests the ways in which a connection between a client and a host ends: each side
// sees how the other one ended. pair connects them.
func Ends(t *testing.T, pair func(*testing.T) (client, host *net.TCPConn)) {
	for name, end := range map[string]func(t *testing.T, client, host *net.TCPConn){
		"the host aborts within a file": func(t *testing.T, client, host *net.TCPConn) {
			write(t, host)
			half(t, client)
			Abort(host)
			Reset(t, "the client", client)
		},
		"the client aborts within a file": func(t *testing.T, client, host *net.TCPConn) {
			write(t, client)
			half(t, host)
			Abort(client)
			Reset(t, "the host", host)
		},
		"the host aborts before anything is sent": func(t *testing.T, client, host *net.TCPConn) {
			Abort(host)
			Reset(t, "the client", client)
		},
		"the client aborts before anything is sent": func(t *testing.T, client, host *net.TCPConn) {
			Abort(client)
			Reset(t, "the host", host)
		},
		"the host closes before it has read all": func(t *testing.T, client, host *net.TCPConn) {
			write(t, client)
			half(t, host)
			rest(t, host)
			_ = host.Close() // its kernel makes that a reset
			Reset(t, "the client", client)
		},
		"the client closes before it has read all": func(t *testing.T, client, host *net.TCPConn) {
			write(t, host)
			half(t, client)
			rest(t, client)
			_ = client.Close()
			Reset(t, "the host", host)
		},
		"the host ends first": func(t *testing.T, client, host *net.TCPConn) {
			write(t, host)
			_ = host.CloseWrite()
			all(t, "the client", client)
			write(t, client)
			_ = client.CloseWrite()
			all(t, "the host", host)
		},
		"the client ends first": func(t *testing.T, client, host *net.TCPConn) {
			write(t, client)
			_ = client.CloseWrite()
			all(t, "the host", host)
			write(t, host)
			_ = host.Close()
			all(t, "the client", client)
		},
		"nobody sends anything": func(t *testing.T, client, host *net.TCPConn) {
			_ = host.CloseWrite()
			if b, err := io.ReadAll(client); len(b) > 0 || err != nil {
				t.Errorf("the client reads %d bytes, %v", len(b), err)
			}
			_ = client.Close()
			if b, err := io.ReadAll(host); len(b) > 0 || err != nil {
				t.Errorf("the host reads %d bytes, %v", len(b), err)
			}
		},
		"the client ends and then aborts": func(t *testing.T, client, host *net.TCPConn) {
			write(t, client)
			_ = client.CloseWrite()
			all(t, "the host", host)
			Abort(client)
			told(t, "the host", host)
		},
		"the host ends and then aborts": func(t *testing.T, client, host *net.TCPConn) {
			write(t, host)
			_ = host.CloseWrite()
			all(t, "the client", client)
			Abort(host)
			told(t, "the client", client)
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, host := pair(t)
			for _, c := range []*net.TCPConn{client, host} {
				t.Cleanup(func() { _ = c.Close() })
				_ = c.SetDeadline(time.Now().Add(patience))
			}
			end(t, client, host)
		})
	}
}

// Abort ends a connection with a reset.
func Abort(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// Reset reads until the end, which has to be a reset.
func Reset(t testing.TB, who string, c net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s reads %d bytes and then %v, want a reset", who, n, err)
	}
}

// told sends until that fails with a reset. The other side's end was read already.
func told(t testing.TB, who string, c net.Conn) {
	t.Helper()
	var err error
	if !testwait.Poll(patience, func() bool {
		_, err = c.Write([]byte("x"))
		return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
	}) {
		t.Errorf("%s isn't told: %v", who, err)
	}
}

func write(t testing.TB, c net.Conn) {
	t.Helper()
	_, err := c.Write(file)
	Must(t, err)
}

func half(t testing.TB, c net.Conn) {
	t.Helper()
	_, err := io.ReadFull(c, make([]byte, len(file)/2))
	Must(t, err)
}

// rest waits until the second half is there to be read.
func rest(t testing.TB, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	Must(t, err)
	testwait.For(t, patience, "the rest of a file", func() bool {
		n := 0
		Must(t, raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }))
		return err == nil && n == len(file)-len(file)/2
	})
}

func all(t testing.TB, who string, c net.Conn) {
	t.Helper()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, file) {
		t.Errorf("%s reads %d bytes, %v, want %d and a clean end", who, len(got), err, len(file))
	}
}
