//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ztgate/internal/testwait"
	"ztgate/router/lab"
)

// startNginx runs an nginx and returns its access log.
func startNginx(t *testing.T, top *lab.Topology, n *lab.Namespace, name, config string) (log string) {
	t.Helper()
	dir, err := top.Home(name)
	if err != nil {
		t.Fatal(err)
	}
	head := "daemon off; master_process off; pid DIR/nginx.pid; error_log stderr; events {}\n"
	if strings.Contains(config, "stream {") {
		head = "load_module /usr/lib/nginx/modules/ngx_stream_module.so; " + head
	}
	startProgram(t, top, n, name, filepath.Join(dir, "nginx.conf"), strings.ReplaceAll(head+config, "DIR", dir), "nginx", "-p", dir, "-c")
	return filepath.Join(dir, "access.log")
}

func startHAProxy(t *testing.T, top *lab.Topology, n *lab.Namespace, config string) {
	t.Helper()
	dir, err := top.Home("haproxy")
	if err != nil {
		t.Fatal(err)
	}
	startProgram(t, top, n, "haproxy", filepath.Join(dir, "haproxy.cfg"), config, "haproxy", "-db", "-f")
}

// startProgram runs a program with a configuration file as its last argument, until it
// listens.
func startProgram(t *testing.T, top *lab.Topology, n *lab.Namespace, name, file, config, program string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err == nil {
		err = os.WriteFile(file, []byte(config), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := top.StartPlain(n, name, path, append(args, file)...)
	if err != nil {
		t.Fatal(err)
	}
	testwait.NoError(t, soon, func() error {
		out, err := n.Run(t.Context(), "ss", "-Htlnp")
		if err != nil || !strings.Contains(string(out), fmt.Sprintf("pid=%d,", p.PID)) {
			return fmt.Errorf("%s doesn't listen: %w\n%s\n%s", name, err, out, p.Tail(10))
		}
		return nil
	})
}

// postfix is a mail server that takes mails for user@example.test.
type postfix struct{ dir, box string }

// startPostfix runs one at the addresses of a namespace, separated by commas, with these
// services for SMTP in its master.cf.
func startPostfix(t *testing.T, top *lab.Topology, n *lab.Namespace, name, addresses, services string) *postfix {
	t.Helper()
	dir, err := os.MkdirTemp("", "ztgate-"+name+"-") // of others than root, which the topology's isn't
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for file, text := range map[string]string{
		"main.cf": `
compatibility_level = 3.6
queue_directory = DIR/queue
data_directory = DIR/data
maillog_file = DIR/mail.log
maillog_file_prefixes = DIR
inet_interfaces = ADDRESSES
inet_protocols = all
myhostname = mail.example.test
mydestination =
virtual_mailbox_domains = example.test
virtual_mailbox_base = DIR/box
virtual_mailbox_maps = inline:{ user@example.test=user }
virtual_uid_maps = static:USER
virtual_gid_maps = static:GROUP
smtpd_relay_restrictions = reject_unauth_destination
smtpd_peername_lookup = no
disable_dns_lookups = yes
alias_maps =
local_recipient_maps =
`,
		"master.cf": services + `
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
error unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
pickup unix n - n 60 1 pickup
`,
	} {
		uid, gid := strings.TrimSpace(run(t, n, "id", "-u", "postfix")), strings.TrimSpace(run(t, n, "id", "-g", "postfix"))
		text = strings.NewReplacer("DIR", dir, "USER", uid, "GROUP", gid, "ADDRESSES", addresses).Replace(text)
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(filepath.Join(dir, "queue"), 0o755), os.Mkdir(filepath.Join(dir, "data"), 0o700), os.Mkdir(filepath.Join(dir, "box"), 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, n, "chown", "postfix", filepath.Join(dir, "data"), filepath.Join(dir, "box"))
	run(t, n, "postfix", "-c", dir, "start")
	t.Cleanup(func() { _, _ = n.Run(top.Context(), "postfix", "-c", dir, "stop") })
	return &postfix{dir: dir, box: filepath.Join(dir, "box", "user")}
}

// seen sends a mail from an address of a namespace and returns the address that the
// delivered mail names as its sender's.
func (p *postfix) seen(t *testing.T, n *lab.Namespace, from string, at netip.AddrPort) (as string) {
	t.Helper()
	_ = os.Remove(p.box)
	sent := run(t, n, "swaks", "--server", at.Addr().String(), "--port", fmt.Sprint(at.Port()), "--local-interface", from, "--helo", "client.example",
		"--from", "sender@example.net", "--to", "user@example.test", "--header", "Subject: who am I", "--timeout", "10")
	testwait.NoError(t, soon, func() error {
		got, err := os.ReadFile(p.box)
		if err != nil || !strings.Contains(string(got), "Subject: who am I") {
			log, _ := os.ReadFile(filepath.Join(p.dir, "mail.log"))
			return fmt.Errorf("no mail has come: %w\n%s\n%s", err, sent, log)
		}
		_, rest, ok := strings.Cut(string(got), "from client.example (unknown [")
		if as, _, _ = strings.Cut(rest, "]"); !ok {
			return fmt.Errorf("the mail doesn't say who sent it:\n%s", got)
		}
		as = strings.TrimPrefix(as, "IPv6:")
		return nil
	})
	return as
}
