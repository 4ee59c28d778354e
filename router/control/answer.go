// Package control is the API of a running process, as JSON over a unix socket: what
// it shows, its server and its client. It knows nothing of the gateway behind it.
package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// errorLogEvery is how often the HTTP servers' complaints are logged: without
// descriptors they complain at every attempt to accept a connection.
const errorLogEvery = time.Minute

// ErrorLog writes complaints of HTTP servers to the log.
type ErrorLog struct {
	Log *slog.Logger

	mu   sync.Mutex
	next time.Time
	left int // out, since the last one
}

func (l *ErrorLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Before(l.next) {
		l.left++
		return len(b), nil
	}
	l.Log.Warn("HTTP server", "problem", strings.TrimSpace(string(b)), "left_out", l.left)
	l.next, l.left = now.Add(errorLogEvery), 0
	return len(b), nil
}

// maxBody bounds what a caller of the control API may send.
const maxBody = 4 << 20

// Answer wraps a handler whose result or error becomes JSON.
func Answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		v, err := f(r)
		code := http.StatusOK
		if err != nil {
			v, code = NewErrorView(err), http.StatusInternalServerError
			switch fault.KindOf(err) {
			case fault.KindUsage:
				code = http.StatusBadRequest
			case fault.KindNotReady:
				code = http.StatusServiceUnavailable
			}
		}
		WriteJSON(w, code, v)
	}
}

func WriteJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code = http.StatusInternalServerError
		b, _ = json.Marshal(NewErrorView(fmt.Errorf("encode answer: %w", err)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // the caller may have gone
}

func ReadJSON(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fault.Usagef("read request: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fault.Usagef("read request: more than one value")
	}
	return nil
}

// flowFilter reads the parameters of a question for flows.
func ParseFlowFilter(value func(string) string) (f FlowFilter, err error) {
	for _, a := range []struct {
		name string
		to   *netip.Prefix
	}{{"to", &f.To}, {"from", &f.From}} {
		if v := value(a.name); v != "" {
			if *a.to, err = config.ParsePrefix(v); err != nil {
				return f, fault.Usagef("--%s %q: %w", a.name, v, err)
			}
		}
	}
	if f.Protocol, err = parseProtocol(value("protocol")); err != nil {
		return f, err
	}
	f.State = value("state")
	if v := value("network"); v != "" {
		if f.Network, err = ztnode.ParseNetworkID(v); err != nil {
			return f, fault.Usage(err)
		}
	}
	if top := value("top"); top != "" {
		if f.Top, err = strconv.Atoi(top); err != nil || f.Top < 1 || f.Top > MaxFlows {
			return f, fault.Usagef("--top %q: give a number from 1 to %d", top, MaxFlows)
		}
	}
	return f, nil
}

// PrefixList is for the status page.
func PrefixList(list []netip.Prefix) string {
	out := ""
	for i, p := range list {
		if i > 0 {
			out += ", "
		}
		out += p.String()
	}
	return out
}
