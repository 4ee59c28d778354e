package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// HTTPClient returns a client whose connections begin in the namespace. It trusts
// any certificate: the office's is its own.
func (n *Namespace) HTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:     n.Dial,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
}

// get fetches a small page.
func get(ctx context.Context, c *http.Client, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return "", fmt.Errorf("get %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("get %s: %s: %s", url, resp.Status, bytes.TrimSpace(b))
	}
	return strings.TrimSpace(string(b)), nil
}

// Transfer is the result of a bulk transfer.
type Transfer struct {
	Bytes    int64         `json:"bytes"`
	Duration time.Duration `json:"nanoseconds"`
}

// BitsPerSecond returns the rate.
func (t Transfer) BitsPerSecond() float64 {
	if t.Duration <= 0 {
		return 0
	}
	return float64(t.Bytes) * 8 / t.Duration.Seconds()
}

// download receives from the office for about d over several connections.
func download(ctx context.Context, c *http.Client, base string, d time.Duration, streams int) (Transfer, error) {
	url := fmt.Sprintf("%s%s?seconds=%g", base, pathDownload, d.Seconds())
	return parallel(ctx, d, streams, func(ctx context.Context) (int64, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		return io.Copy(io.Discard, resp.Body)
	})
}

// upload sends to the office for about d over several connections. What the
// office received counts.
func upload(ctx context.Context, c *http.Client, base string, d time.Duration, streams int) (Transfer, error) {
	return parallel(ctx, d, streams, func(ctx context.Context) (int64, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+pathUpload, &endless{until: time.Now().Add(d)})
		if err != nil {
			return 0, err
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		var r uploadResult
		if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
			return 0, fmt.Errorf("read answer to upload (%s): %w", resp.Status, err)
		}
		return r.Bytes, nil
	})
}

func parallel(ctx context.Context, d time.Duration, streams int, one func(context.Context) (int64, error)) (Transfer, error) {
	ctx, cancel := context.WithTimeout(ctx, d+20*time.Second)
	defer cancel()
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		sum int64
		bad error
	)
	start := time.Now()
	for range streams {
		wg.Go(func() {
			n, err := one(ctx)
			mu.Lock()
			defer mu.Unlock()
			sum += n
			if err != nil && bad == nil {
				bad = err
			}
		})
	}
	wg.Wait()
	return Transfer{sum, time.Since(start)}, bad
}

// Ping sends one ICMP echo request from the namespace and waits for the answer.
func (n *Namespace) Ping(ctx context.Context, dst netip.Addr) (time.Duration, error) {
	var conn *icmp.PacketConn
	if err := n.Do(func() (err error) {
		conn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	}); err != nil {
		return 0, fmt.Errorf("open ping socket in %q: %w", n.Name, err)
	}
	defer conn.Close()
	if end, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(end)
	}
	id, seq := os.Getpid()&0xffff, rand.IntN(1<<16)
	msg := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, 56)}}
	b, err := msg.Marshal(nil)
	if err != nil {
		return 0, fmt.Errorf("ping %s: %w", dst, err)
	}
	start := time.Now()
	if _, err := conn.WriteTo(b, &net.IPAddr{IP: dst.AsSlice()}); err != nil {
		return 0, fmt.Errorf("ping %s: %w", dst, err)
	}
	buf := make([]byte, 1500)
	for {
		k, from, err := conn.ReadFrom(buf)
		if err != nil {
			return 0, fmt.Errorf("ping %s: %w", dst, err)
		}
		m, err := icmp.ParseMessage(1, buf[:k])
		if err != nil || m.Type != ipv4.ICMPTypeEchoReply || from.String() != dst.String() {
			continue // the socket gets all ICMP of the namespace
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && e.Seq == seq {
			return time.Since(start), nil
		}
	}
}
