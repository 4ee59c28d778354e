//go:build e2e

package attack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

const (
	httpAt       = "127.0.0.1:9002"
	apiAt        = "127.0.0.1:9993"
	healthWithin = time.Second
)

// socketPath is the gateway's control socket.
func (w *world) socketPath() string { return filepath.Join(w.Dir, "gw", "ztgate.sock") }

// health runs `ztgate health` and returns an error unless it answers in time, whatever
// the answer is.
func (w *world) health() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*healthWithin)
	defer cancel()
	start := time.Now()
	out, err := w.Gateway.Run(ctx, w.binary, "health", "--socket", w.socketPath())
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == fault.ExitCode(fault.NotReady("not ready")) {
		err = nil
	}
	if d := time.Since(start); d > healthWithin {
		return fmt.Errorf("ztgate health took %.1f s: %w", d.Seconds(), err)
	}
	if err != nil {
		return fmt.Errorf("ztgate health: %w: %s", err, out)
	}
	return nil
}

// apiAnswers returns an error unless the API of the local service answers who has its
// token, and was asked with wrong ones.
func (w *world) apiAnswers() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*healthWithin)
	defer cancel()
	token, err := os.ReadFile(filepath.Join(w.Dir, "gw", "authtoken.secret"))
	if err != nil {
		return err
	}
	out, err := w.Gateway.Run(ctx, "curl", "-sf", "-m", "1", "-H", "X-ZT1-Auth: "+string(token), "http://"+apiAt+"/status")
	if err != nil || !bytes.Contains(out, []byte(`"publicIdentity"`)) {
		return fmt.Errorf("the API doesn't answer: %w: %s", err, out)
	}
	out, err = w.Gateway.Run(ctx, "curl", "-sf", "-m", "1", "http://"+httpAt+"/metrics")
	if err != nil || bytes.Contains(out, []byte("ztgate_api_requests_total{result=\"limited\"} 0\n")) {
		return fmt.Errorf("no wrong token was limited: the row tests nothing (%w)", err)
	}
	return nil
}

// withHealth asks for health during an attack too.
func (w *world) withHealth(run func(context.Context) (int, int)) attack {
	var during error
	return attack{
		run: func(ctx context.Context) (tries, bytes int) {
			var ask sync.WaitGroup
			ask.Go(func() {
				pace(ctx, 1, func(int) {
					if err := w.health(); err != nil && during == nil {
						during = err
					}
				})
			})
			defer ask.Wait()
			return run(ctx)
		},
		check: func() error { return errors.Join(during, w.health()) },
	}
}

// httpConns opens connections to an HTTP port, and sends each of them something.
func (w *world) httpConns(at string, most, rate int, talk func(c net.Conn)) func(context.Context) (int, int) {
	return func(ctx context.Context) (tries, bytes int) {
		var mu sync.Mutex
		var held []net.Conn
		var dials sync.WaitGroup
		room := make(chan struct{}, 200)
		pace(ctx, rate, func(int) {
			select {
			case room <- struct{}{}:
			default:
				return
			}
			if tries == most {
				<-room
				return
			}
			tries++
			dials.Go(func() {
				defer func() { <-room }()
				one, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				c, err := w.Gateway.Dial(one, "tcp4", at)
				if err != nil {
					return
				}
				mu.Lock()
				held = append(held, c)
				mu.Unlock()
				if talk != nil {
					talk(c)
				}
			})
		})
		<-ctx.Done()
		dials.Wait()
		for _, c := range held {
			_ = c.Close()
		}
		return tries, 0
	}
}

var localRows = []row{
	{name: "local/600 idle HTTP connections, 256 descriptors", few: true, prepare: func(w *world) attack {
		return w.withHealth(w.httpConns(httpAt, 600, 1000, nil))
	}},
	{name: "local/19,900 half-sent requests", prepare: func(w *world) attack {
		return w.withHealth(w.httpConns(httpAt, 19_000, 6000, func(c net.Conn) { _, _ = c.Write([]byte("GET /metrics HTTP/1.1\r\nHost: a\r\nX-A: ")) }))
	}},
	{name: "local/slow requests", prepare: func(w *world) attack {
		return w.withHealth(w.httpConns(httpAt, 150, 1000, func(c net.Conn) {
			_, _ = c.Write([]byte("GET / HTTP/1.1\r\n"))
			for i := 0; ; i++ {
				_ = c.SetWriteDeadline(time.Now().Add(time.Second))
				if _, err := fmt.Fprintf(c, "X-%d: y\r\n", i); err != nil || i == int(*duration/(100*time.Millisecond)) {
					return
				}
				<-time.After(100 * time.Millisecond)
			}
		}))
	}},
	{name: "local/scrapes as fast as it goes", prepare: func(w *world) attack {
		return w.withHealth(w.httpConns(httpAt, 19_000, 300, func(c net.Conn) {
			_, _ = c.Write([]byte("GET /metrics HTTP/1.0\r\n\r\n"))
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = c.Read(make([]byte, 1)) // and no more
		}))
	}},
	{name: "local/wrong tokens as fast as it goes", prepare: func(w *world) attack {
		a := w.withHealth(w.httpConns(apiAt, 19_000, 2000, func(c net.Conn) {
			for range 20 {
				_, _ = c.Write([]byte("GET /controller/network HTTP/1.1\r\nHost: a\r\nX-ZT1-Auth: 0123456789abcdefghijklmn\r\n\r\n"))
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = c.Read(make([]byte, 1))
		}))
		health := a.check
		a.check = func() error { return errors.Join(health(), w.apiAnswers()) }
		return a
	}},
	{name: "local/garbage to the control socket, 256 descriptors", few: true, prepare: func(w *world) attack {
		var mu sync.Mutex
		var held []net.Conn
		w.cleanup(func() {
			for _, c := range held {
				_ = c.Close()
			}
		})
		return w.withHealth(func(ctx context.Context) (int, int) {
			n := pace(ctx, 200, func(i int) {
				c, err := net.DialTimeout("unix", w.socketPath(), 100*time.Millisecond)
				if err != nil {
					return
				}
				b := make([]byte, rand.IntN(2000))
				for k := range b {
					b[k] = byte(rand.Uint32())
				}
				switch i % 4 {
				case 0:
					b = append([]byte("POST /v1/explain HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n"), b...)
				case 1:
					b = []byte("GET /v1/flows?top=-1&to=%ff&state=%00 HTTP/1.1\r\nHost: a\r\n\r\n")
				case 2:
					b = nil // idle
				}
				_ = c.SetDeadline(time.Now().Add(100 * time.Millisecond))
				_, _ = c.Write(b)
				mu.Lock()
				defer mu.Unlock()
				if len(held) < 600 {
					held = append(held, c)
					return
				}
				_ = c.Close()
			})
			return n, 0
		})
	}},
	{name: "local/70 joins by the API", prepare: func(w *world) attack {
		a := w.withHealth(func(ctx context.Context) (tries, bytes int) {
			pace(ctx, 50, func(i int) {
				if i < 70 {
					tries++
					_, _ = w.GatewayAPI.Join(ctx, ztnode.NetworkID(rand.Uint64()>>8|0xee<<56).String())
				}
			})
			return tries, 0
		})
		before := a.check
		a.check = func() error {
			err := before()
			w.GatewayProcess.Stop()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if e := w.StartGateway(ctx); e != nil {
				return errors.Join(err, e)
			}
			// It isn't ready: it waits for networks that don't exist. It has to serve the one that
			// does.
			if e := eventually(func() error { return connect(w.VPC, client, officeAt.String()) }); e != nil {
				return errors.Join(err, fmt.Errorf("started again with what was joined: %w", e))
			}
			list, e := w.GatewayAPI.Networks(ctx)
			for _, n := range list.Networks {
				if n.ID != w.Network {
					_, e2 := w.GatewayAPI.Leave(ctx, n.ID.String())
					e = errors.Join(e, e2)
				}
			}
			return errors.Join(err, e)
		}
		return a
	}},
}
