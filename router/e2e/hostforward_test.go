//go:build e2e

package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
	"ztgate/router/lab/labtest"
)

// dialFrom connects from an address of a namespace.
func dialFrom(n *lab.Namespace, from, to string) (c *net.TCPConn, err error) {
	err = n.Do(func() (err error) {
		c, err = net.DialTCP("tcp", &net.TCPAddr{IP: net.ParseIP(from)}, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		return err
	})
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return c, err
}

// TestHostForward tests forwards on an address of the gateway's host with the real
// stack towards the overlay: each side sees how the other one ended, and one client
// can't take all.
func TestHostForward(t *testing.T) {
	o := options(t)
	o.Config = `
forwards:
  - {listen: "tcp/172.31.0.1:2222", to: "10.0.0.10:7"}
  - {listen: "tcp/172.31.0.1:2223", to: "10.0.0.10:81"}
`
	s := start(t, o)
	const at, client, other = "172.31.0.1:2222", "172.31.0.10", "172.31.0.11"
	l, err := s.Office.Listen("tcp", office+":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	pair := func(t *testing.T) (a, b *net.TCPConn) {
		t.Helper()
		a, err := dialFrom(s.VPC, client, at)
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		b = c.(*net.TCPConn)
		_ = b.SetDeadline(time.Now().Add(10 * time.Second))
		t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
		return a, b
	}
	labtest.Ends(t, pair)
	t.Run("the host refuses", func(t *testing.T) {
		c, err := dialFrom(s.VPC, client, "172.31.0.1:2223")
		if err != nil {
			if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNREFUSED) {
				t.Error(err)
			}
			return
		}
		defer c.Close()
		labtest.Reset(t, "the client", c)
	})
	t.Run("short connections", func(t *testing.T) { // more than there are ports
		for i := range 3500 {
			a, b := pair(t)
			_ = a.CloseWrite()
			if _, err := io.Copy(io.Discard, b); err != nil {
				t.Fatalf("connection %d: %v", i+1, err)
			}
			_ = b.Close()
			if _, err := io.Copy(io.Discard, a); err != nil {
				t.Fatalf("connection %d: %v", i+1, err)
			}
			_ = a.Close()
		}
	})
	t.Run("one client takes all it gets", func(t *testing.T) {
		hosts := make(chan net.Conn, 8192)
		go func() {
			defer close(hosts)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				hosts <- c
			}
		}()
		var kept []net.Conn
		t.Cleanup(func() {
			for _, c := range kept {
				_ = c.Close()
			}
			_ = l.Close()
			for c := range hosts {
				_ = c.Close()
			}
		})
		run(t, s.VPC, "ip", "address", "add", other+"/32", "dev", "lo")
		run(t, s.Gateway, "ip", "route", "add", other, "via", client)
		before := rss(t, s.GatewayProcess.PID)
		for range 4200 {
			c, err := dialFrom(s.VPC, client, at)
			if err == nil {
				kept = append(kept, c)
			} else if !errors.Is(err, unix.ECONNRESET) {
				t.Fatal(err)
			}
		}
		began := time.Now()
		c, err := dialFrom(s.VPC, other, at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		testwait.For(t, time.Second, "another client's connection", func() bool {
			for {
				select {
				case h := <-hosts:
					kept = append(kept, h)
					_, _ = h.Write([]byte("x"))
				default:
					_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
					_, err := c.Read(make([]byte, 1))
					return err == nil
				}
			}
		})
		t.Logf("another client is served after %v, %d MB more", time.Since(began), (rss(t, s.GatewayProcess.PID)-before)>>20)
		if grown := rss(t, s.GatewayProcess.PID) - before; grown > 40<<20 {
			t.Errorf("memory grew by %d MB", grown>>20)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		st, err := s.GatewayAPI.Status(ctx)
		if err != nil || !st.Health.Ready || len(st.Limited) == 0 || st.Limited[0].Client.Addr().String() != client {
			t.Errorf("status: ready %v, limited %v, %v", st.Health.Ready, st.Limited, err)
		}
	})
}
