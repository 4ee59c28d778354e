package webhook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ztgate/zerotier/ztnode"
)

// program is what is behind a webhook, in memory.
type program struct {
	answer func(*http.Request) (*http.Response, error)

	mu   sync.Mutex
	got  []*http.Request
	body [][]byte
	at   []time.Time
}

func (p *program) RoundTrip(r *http.Request) (*http.Response, error) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.got, p.body, p.at = append(p.got, r), append(p.body, b), append(p.at, time.Now())
	p.mu.Unlock()
	return p.answer(r)
}

func says(code int, body string) func(*http.Request) (*http.Response, error) {
	return func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{"Location": {"https://elsewhere.example/"}},
			Body: io.NopCloser(strings.NewReader(body))}, nil
	}
}

var key = bytes.Repeat([]byte{7}, 32)

type admission struct {
	e     ztnode.MemberEvent
	patch string
}

// send lets a sender work on messages until nothing is left to be done.
func send(t *testing.T, p *program, refuse error, events ...ztnode.MemberEvent) (*Sender, []admission) {
	t.Helper()
	var admitted []admission
	var mu sync.Mutex
	s := New(Config{URL: "https://hooks.example/members", Key: key, UserAgent: "ztgate/test", Transport: p, Logger: slog.New(slog.DiscardHandler),
		Endpoint: func(string) netip.AddrPort { return netip.MustParseAddrPort("198.51.100.7:9993") },
		Admit: func(e ztnode.MemberEvent, patch json.RawMessage) error {
			mu.Lock()
			defer mu.Unlock()
			admitted = append(admitted, admission{e, string(patch)})
			return refuse
		}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for _, e := range events {
		if !s.Send(e) {
			t.Error("no room")
		}
	}
	time.Sleep(5 * time.Minute) // of the bubble
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return s, admitted
}

func requested() ztnode.MemberEvent {
	return ztnode.MemberEvent{Kind: ztnode.MemberRequested, At: time.UnixMilli(1_796_000_000_123), Network: 0x8056c2e21c000001, NetworkName: "office",
		Address: 0x0123456789, Identity: "0123456789:0:aa", Version: "1.14.1", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5")}}
}

// The example of the specification.
func TestSign(t *testing.T) {
	k, err := base64.StdEncoding.DecodeString("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	if err != nil {
		t.Fatal(err)
	}
	got := Sign(k, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", []byte(`{"test": 2432232314}`))
	if want := "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &program{answer: says(204, "")}
		s, admitted := send(t, p, nil, requested())
		if len(p.got) != 1 || s.Count.Delivered.Load() != 1 || len(admitted) != 0 {
			t.Fatalf("%d requests, %d delivered", len(p.got), s.Count.Delivered.Load())
		}
		want := `{"type":"member.requested","timestamp":"2026-11-30T00:53:20.123Z","data":{"network":"8056c2e21c000001","networkName":"office",` +
			`"member":"0123456789","identity":"0123456789:0:aa","name":"","version":"1.14.1","ipAssignments":["10.0.0.5"],"physicalAddress":"198.51.100.7:9993"}}`
		if got := string(p.body[0]); got != want {
			t.Errorf("body\n%s, want\n%s", got, want)
		}
		h := p.got[0].Header
		if p.got[0].Method != "POST" || h.Get("Content-Type") != "application/json" || h.Get("User-Agent") != "ztgate/test" ||
			h.Get("Webhook-Signature") != Sign(key, h.Get("Webhook-Id"), h.Get("Webhook-Timestamp"), p.body[0]) {
			t.Errorf("%s %v", p.got[0].Method, h)
		}
	})
}

// TestRetries: a program that is away is asked again, with pauses that grow, and not
// for ever.
func TestRetries(t *testing.T) {
	for name, answer := range map[string]func(*http.Request) (*http.Response, error){
		"no connection": func(*http.Request) (*http.Response, error) { return nil, errors.New("refused") },
		"error":         says(500, ""), "not found": says(404, ""), "redirect": says(307, ""), "too long": says(200, strings.Repeat(" ", maxAnswer+1)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &program{answer: answer}
				s, _ := send(t, p, nil, requested())
				if len(p.at) != len(pauses)+1 || s.Count.Failed.Load() != 1 || s.Count.Retried.Load() != uint64(len(pauses)) || s.Count.Delivered.Load() != 0 {
					t.Fatalf("%d tries", len(p.at))
				}
				for i, d := range pauses {
					if got := p.at[i+1].Sub(p.at[i]); got != d {
						t.Errorf("pause %d: %v, want %v", i, got, d)
					}
				}
				first, last := p.got[0].Header, p.got[len(p.got)-1].Header
				if first.Get("Webhook-Id") != last.Get("Webhook-Id") || first.Get("Webhook-Timestamp") == last.Get("Webhook-Timestamp") {
					t.Errorf("headers %v and %v", first, last)
				}
			})
		})
	}
}

// TestSlowProgram: an answer that doesn't come ends after a while, and meanwhile nobody
// who has something to tell waits.
func TestSlowProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &program{answer: func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() }}
		begun := time.Now()
		send(t, p, nil, requested())
		if len(p.at) < 2 || p.at[1].Sub(begun) != timeout+pauses[0] {
			t.Errorf("tries at %v", p.at)
		}
	})
}

func TestAnswers(t *testing.T) {
	joined := requested()
	joined.Kind = ztnode.MemberJoined
	for _, tt := range []struct {
		name   string
		e      ztnode.MemberEvent
		answer string
		admits bool
	}{
		{"authorized", requested(), `{"authorized":true,"name":"laptop"}`, true},
		{"refused", requested(), `{"authorized":false}`, true}, // says nothing new
		{"nothing", requested(), ``, false},
		{"a page", requested(), `<html>`, false},
		{"something else", requested(), `{"ok":true}`, false},
		{"no boolean", requested(), `{"authorized":"true"}`, false},
		{"of a member that is in", joined, `{"authorized":true}`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, admitted := send(t, &program{answer: says(200, tt.answer)}, nil, tt.e)
				if (len(admitted) == 1) != tt.admits || tt.admits && (admitted[0].patch != tt.answer || admitted[0].e.Address != tt.e.Address) {
					t.Errorf("admitted %+v", admitted)
				}
				if yes := tt.name == "authorized"; (s.Count.Authorized.Load() == 1) != yes || s.Count.Delivered.Load() != 1 {
					t.Errorf("%d authorized, %d delivered", s.Count.Authorized.Load(), s.Count.Delivered.Load())
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		p := &program{answer: says(200, `{"authorized":true}`)}
		if s, admitted := send(t, p, errors.New("it was removed"), requested()); len(admitted) != 1 || s.Count.Authorized.Load() != 0 || len(p.got) != 1 {
			t.Errorf("an answer that can't be followed: %d requests", len(p.got))
		}
	})
}

// TestQueueIsBounded: with nobody to tell, and with a program that hangs.
func TestQueueIsBounded(t *testing.T) {
	s := New(Config{URL: "https://hooks.example/", Key: key, Logger: slog.New(slog.DiscardHandler)})
	for range MaxWaiting {
		if !s.Send(requested()) {
			t.Fatal("no room")
		}
	}
	if s.Send(requested()) || s.Count.NoRoom.Load() != 1 || s.Waiting() != MaxWaiting {
		t.Errorf("%d wait, %d had no room", s.Waiting(), s.Count.NoRoom.Load())
	}
}
