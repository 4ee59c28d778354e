package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// Paths of the office's web server.
const (
	pathWhoAmI   = "/client"   // the client's address as the server sees it
	pathDownload = "/download" // ?seconds=N: bytes for that long
	pathUpload   = "/upload"   // counts the bytes of the request
)

// maxTransfer bounds one bulk transfer.
const maxTransfer = 10 * time.Minute

// uploadResult is what the office received.
type uploadResult struct {
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"`
}

// ServeOffice is the office's web server: a page and bulk transfers over HTTPS
// with a certificate of its own, and the same without TLS, so that encryption at
// the ends doesn't blur measurements. It listens on ports 443 and 80 of addr in
// the calling process's network namespace.
func ServeOffice(ctx context.Context, addr netip.Addr) error {
	secure, plain, err := listenOffice(ctx, addr, net.Listen)
	if err != nil {
		return err
	}
	return serveOffice(ctx, addr, secure, plain)
}

// listenOffice opens the listeners. It waits a little for the address, which the
// interface may get a moment after the network is joined.
func listenOffice(ctx context.Context, addr netip.Addr, listen func(network, address string) (net.Listener, error)) (secure, plain net.Listener, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = until(ctx, func() (err error) {
		secure, err = listen("tcp", netip.AddrPortFrom(addr, 443).String())
		return err
	})
	if err == nil {
		if plain, err = listen("tcp", netip.AddrPortFrom(addr, 80).String()); err != nil {
			_ = secure.Close()
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("start office server: %w", err)
	}
	return secure, plain, nil
}

// serveOffice serves until ctx ends and closes the listeners.
func serveOffice(ctx context.Context, addr netip.Addr, secure, plain net.Listener) error {
	cert, err := selfSigned(addr)
	if err != nil {
		return errors.Join(err, secure.Close(), plain.Close())
	}
	srv := &http.Server{Handler: officeHandler(), ReadHeaderTimeout: 10 * time.Second,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)} // probes that only connect are no news
	tlsListener := tls.NewListener(secure, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range []net.Listener{tlsListener, plain} {
		g.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve office pages: %w", err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
	return g.Wait()
}

func officeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprintf(w, "<!doctype html><title>Office</title><h1>Office server</h1>\n<p>You come from %s.</p>\n", html.EscapeString(clientOf(r)))
	})
	mux.HandleFunc("GET "+pathWhoAmI, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, clientOf(r)) })
	mux.HandleFunc("GET "+pathDownload, func(w http.ResponseWriter, r *http.Request) {
		seconds, err := strconv.ParseFloat(r.URL.Query().Get("seconds"), 64)
		d := time.Duration(seconds * float64(time.Second))
		if err != nil || d <= 0 || d > maxTransfer {
			http.Error(w, "give seconds, at most 600", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = io.Copy(w, &endless{until: time.Now().Add(d)}) // the client may have enough earlier
	})
	mux.HandleFunc("POST "+pathUpload, func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_ = json.NewEncoder(w).Encode(uploadResult{n, time.Since(start).Seconds()})
	})
	return mux
}

func clientOf(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// endless yields bytes until its time is over.
type endless struct{ until time.Time }

func (e *endless) Read(b []byte) (int, error) {
	if !time.Now().Before(e.until) {
		return 0, io.EOF
	}
	return len(b), nil // whatever is in b: the content doesn't matter
}

func selfSigned(addr netip.Addr) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make key: %w", err)
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "office"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{addr.AsSlice()},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
