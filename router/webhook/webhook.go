// Package webhook tells a program, by signed HTTP requests, of the nodes that ask our
// controller for a network, so that it can authorise them. The form is that of Standard
// Webhooks (standardwebhooks.com), for which there are libraries.
package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"ztgate/zerotier/ztnode"
)

// Bounds. A program that is away costs each message a minute and three quarters; while
// its node waits, the controller tells the same again.
const (
	MaxWaiting = 256 // messages
	senders    = 4
	timeout    = 10 * time.Second // of one try
	maxAnswer  = 64 << 10
)

// pauses are those before a message is tried again.
var pauses = [...]time.Duration{2 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute}

// Config says whom to tell.
type Config struct {
	URL       string
	Key       []byte
	UserAgent string
	// Admit changes the record of a node that asked, by what the program answered.
	Admit func(e ztnode.MemberEvent, patch json.RawMessage) error
	// Endpoint says where a node is seen; invalid = not known. Nil = nobody knows.
	Endpoint  func(address string) netip.AddrPort
	Transport http.RoundTripper // nil = the usual one
	Logger    *slog.Logger
}

// Sender sends messages. Run does the work.
type Sender struct {
	Count Counts

	cfg    Config
	client *http.Client
	queue  chan ztnode.MemberEvent
}

// Counts are how many messages ended how, and how many tries failed.
type Counts struct {
	Delivered, Failed, NoRoom, Retried, Authorized atomic.Uint64
}

// New returns a sender.
func New(cfg Config) *Sender {
	return &Sender{cfg: cfg, queue: make(chan ztnode.MemberEvent, MaxWaiting), client: &http.Client{
		Transport: cfg.Transport, Timeout: timeout,
		// The key is agreed with one program, not with whom it names.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Send takes a message without blocking; false if there is no room.
func (s *Sender) Send(e ztnode.MemberEvent) bool {
	select {
	case s.queue <- e:
		return true
	default:
		s.Count.NoRoom.Add(1)
		return false
	}
}

// Waiting returns how many messages nobody sends yet.
func (s *Sender) Waiting() int { return len(s.queue) }

// Run sends until ctx ends, which is not an error.
func (s *Sender) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for range senders {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case e := <-s.queue:
					s.deliver(ctx, e)
				}
			}
		})
	}
	return g.Wait()
}

// message is the body.
type message struct {
	Type      string    `json:"type"`
	Timestamp time.Time `json:"timestamp"`
	Data      data      `json:"data"`
}

type data struct {
	Network     string       `json:"network"`
	NetworkName string       `json:"networkName"`
	Member      string       `json:"member"`
	Identity    string       `json:"identity"`
	Name        string       `json:"name"`
	Version     string       `json:"version"`
	Addresses   []netip.Addr `json:"ipAssignments"`
	Endpoint    string       `json:"physicalAddress,omitempty"`
}

func (s *Sender) body(e ztnode.MemberEvent) ([]byte, error) {
	m := message{e.Kind, e.At.UTC(), data{Network: e.Network.String(), NetworkName: e.NetworkName, Member: e.Address.String(), Identity: e.Identity,
		Name: e.Name, Version: e.Version, Addresses: append([]netip.Addr{}, e.Addresses...)}}
	if s.cfg.Endpoint != nil {
		if ep := s.cfg.Endpoint(m.Data.Member); ep.IsValid() {
			m.Data.Endpoint = ep.String()
		}
	}
	return json.Marshal(m)
}

// deliver sends one message, again if need be, and does what is answered.
func (s *Sender) deliver(ctx context.Context, e ztnode.MemberEvent) {
	log := s.cfg.Logger.With("type", e.Kind, "network", e.Network, "member", e.Address)
	body, err := s.body(e)
	if err != nil {
		s.Count.Failed.Add(1)
		log.Error("webhook", "error", err)
		return
	}
	id := newID()
	for try := 0; ; try++ {
		answer, err := s.post(ctx, id, body)
		if err == nil {
			s.Count.Delivered.Add(1)
			s.act(e, answer, log)
			return
		}
		if ctx.Err() != nil {
			return // the controller tells it again after the start
		}
		if try == len(pauses) {
			s.Count.Failed.Add(1)
			log.Warn("webhook: nobody takes the message", "tries", try+1, "error", err)
			return
		}
		s.Count.Retried.Add(1)
		log.Debug("webhook: another try follows", "in", pauses[try], "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(pauses[try]):
		}
	}
}

// post makes one try.
func (s *Sender) post(ctx context.Context, id string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	now := strconv.FormatInt(time.Now().Unix(), 10)
	h := req.Header
	h.Set("Content-Type", "application/json")
	h.Set("User-Agent", s.cfg.UserAgent)
	h.Set("Webhook-Id", id)
	h.Set("Webhook-Timestamp", now)
	h.Set("Webhook-Signature", Sign(s.cfg.Key, id, now, body))
	res, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode < 200 || res.StatusCode > 299:
		return nil, fmt.Errorf("the answer is %s", res.Status)
	case len(answer) > maxAnswer:
		return nil, fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	return answer, nil
}

// Sign returns the signature of a message, as its header has it.
func Sign(key []byte, id, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + timestamp + "."))
	mac.Write(body)
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// act does what the program answered to the question whether a node is let in.
func (s *Sender) act(e ztnode.MemberEvent, answer []byte, log *slog.Logger) {
	if e.Kind != ztnode.MemberRequested || len(bytes.TrimSpace(answer)) == 0 {
		return
	}
	var says struct {
		Authorized *bool `json:"authorized"`
	}
	err := json.Unmarshal(answer, &says)
	if err != nil || says.Authorized == nil {
		return // a page, or a thank you
	}
	if err = s.cfg.Admit(e, answer); err != nil {
		log.Warn("webhook: the answer can't be followed", "error", err)
		return
	}
	if *says.Authorized {
		s.Count.Authorized.Add(1)
		log.Info("webhook: the member is authorized")
	}
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return "msg_" + hex.EncodeToString(b[:])
}
