package config

import (
	"encoding/base64"
	"errors"
	"net/netip"
	"net/url"
	"strings"
)

// Bounds of a webhook's key, in bytes; see standardwebhooks.com.
const (
	minWebhookKey = 24
	maxWebhookKey = 64
)

// setWebhookURL takes no address to which others could listen: the answer decides who
// becomes a member, and isn't signed.
func setWebhookURL(c *Config, v string) error {
	if c.Webhook.URL = v; v == "" {
		return nil
	}
	u, err := url.Parse(v)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return errors.New("give https://HOST/PATH")
	case u.User != nil || u.Fragment != "":
		return errors.New("leave out user name, password and fragment: messages are signed with webhook.secret")
	case u.Scheme == "http" && !onThisHost(u.Hostname()):
		return errors.New("use https: the answer may authorise members, and anybody on the way could write it; http is for this host alone, as in http://127.0.0.1:8080/")
	}
	return nil
}

func onThisHost(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback() || host == "localhost"
}

// ParseWebhookKey reads whsec_ and the key in base64.
func ParseWebhookKey(s string) ([]byte, error) {
	text, ok := strings.CutPrefix(s, "whsec_")
	key, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(key) < minWebhookKey || len(key) > maxWebhookKey {
		return nil, errors.New(`want whsec_ and 24 to 64 random bytes in base64, as "whsec_$(openssl rand -base64 32)" makes`)
	}
	return key, nil
}

type keyProblem struct{ key, text string }

func (c *Config) checkWebhook() (out []keyProblem) {
	switch w := c.Webhook; {
	case w.URL == "" && w.Secret == "":
	case w.URL == "":
		out = append(out, keyProblem{"webhook.secret", "is of no use without webhook.url: give both or none"})
	case w.Secret == "":
		out = append(out, keyProblem{"webhook.url", "needs webhook.secret, the key that messages are signed with"})
	default:
		if _, err := ParseWebhookKey(w.Secret); err != nil {
			out = append(out, keyProblem{"webhook.secret", err.Error()})
		}
		if !c.Controller {
			out = append(out, keyProblem{"webhook.url", "only a controller has something to tell: set controller: true (--controller)"})
		}
	}
	return out
}
