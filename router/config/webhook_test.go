package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const webhookKey = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

// TestWebhook: nobody on the way may write the answer, and nobody goes without a key.
func TestWebhook(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(webhookKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ url, secret, want string }{
		{"", "", ""},
		{"https://hooks.example/members?x=1", webhookKey, ""},
		{"https://hooks.example/", "file:" + file, ""},
		{"http://127.0.0.1:8080/", webhookKey, ""},
		{"http://[::1]:8080/", webhookKey, ""},
		{"http://localhost/", webhookKey, ""},
		{"http://hooks.example/", webhookKey, "use https"},
		{"http://10.0.0.5/", webhookKey, "use https"},
		{"http://127.0.0.1.example/", webhookKey, "use https"},
		{"ftp://hooks.example/", webhookKey, "give https://HOST/PATH"},
		{"hooks.example", webhookKey, "give https://HOST/PATH"},
		{"https:///x", webhookKey, "give https://HOST/PATH"},
		{"https://me:pass@hooks.example/", webhookKey, "leave out user name"},
		{"https://hooks.example/", "", "needs webhook.secret"},
		{"", webhookKey, "is of no use without webhook.url"},
		{"https://hooks.example/", "secret", "want whsec_"},
		{"https://hooks.example/", "whsec_c2hvcnQ=", "24 to 64"},
		{"https://hooks.example/", "whsec_" + strings.Repeat("a", 4*23), "24 to 64"},
		{"https://hooks.example/", "file:/nonexistent", "no such file"},
	} {
		cfg, err := Load(Sources{NoFile: true, Environ: []string{"ZTGATE_CONTROLLER=true", "ZTGATE_WEBHOOK_URL=" + tt.url, "ZTGATE_WEBHOOK_SECRET=" + tt.secret}})
		if tt.want != "" {
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s, %s: %v, want %q", tt.url, tt.secret, err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), webhookKey) {
				t.Errorf("the error tells the key: %v", err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s, %s: %v", tt.url, tt.secret, err)
			continue
		}
		if tt.secret != "" && cfg.Webhook.Secret != webhookKey {
			t.Errorf("%s: secret %q", tt.secret, cfg.Webhook.Secret)
		}
		for _, v := range cfg.Values() {
			if s, _ := v.Value.(string); strings.Contains(s, webhookKey) {
				t.Errorf("%s is shown as %q", v.Key, s)
			}
		}
	}
	if _, err := Load(Sources{NoFile: true, Environ: []string{"ZTGATE_WEBHOOK_URL=https://hooks.example/", "ZTGATE_WEBHOOK_SECRET=" + webhookKey}}); err == nil || !strings.Contains(err.Error(), "only a controller") {
		t.Errorf("no controller: %v", err)
	}
}
