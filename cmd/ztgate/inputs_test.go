package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// inputs are command lines with something wrong in them, and what is said of it. A
// word in angle brackets stands for a file of the test.
var inputs = map[string]string{
	// commands
	"stauts":                         `Did you mean this? status`,
	"help foo":                       `there is no command "foo"`,
	"help stauts":                    `did you mean status?`,
	"help config shwo":               `did you mean show?`,
	"help status extra":              `ztgate status has no commands`,
	"completion foo":                 `there is no command "foo": use one of bash`,
	"completion":                     `use one of bash`,
	"config shwo":                    `did you mean show?`,
	"controller netwrok":             `did you mean network?`,
	"identity bogus":                 `use one of new, show, validate`,
	"lab dwon":                       `unknown command`,
	"status extra":                   `unknown command`,
	"status --jsno":                  `unknown flag`,
	"status --socket /a --socket /b": `given twice`,
	"status -j -j":                   `given twice`,
	"status --json=maybe":            `invalid`,
	// flows
	"flows --proto foo":                `give tcp, udp, icmp or a number from 1 to 255`,
	"flows --proto tpc":                `did you mean tcp?`,
	"flows --proto 0":                  `number from 1 to 255`,
	"flows --proto 256":                `number from 1 to 255`,
	"flows --proto=":                   `is empty`,
	"flows --state foo":                `use one of new, opening, established`,
	"flows --state establised":         `did you mean established?`,
	"flows --state=":                   `is empty`,
	"flows --top -1":                   `from 1 to 10000`,
	"flows --top 0":                    `from 1 to 10000`,
	"flows --top 99999999":             `from 1 to 10000`,
	"flows --top 1 --top 2":            `given twice`,
	"flows --to 10.0.0.0/33":           `give ADDRESS/BITS`,
	"flows --to 10.0.0.5/24":           `write 10.0.0.0/24`,
	"flows --from nowhere":             `give ADDRESS/BITS`,
	"flows --network 12":               `want 16 hex digits`,
	"flows --network 8056c2e21c000002": `did you mean 8056c2e21c000001?`,
	// explain
	"doctor --from office":                                     `give an address of a host in the VPC`,
	"doctor --from=":                                           `is empty`,
	"doctor --from fe80::1%eth0 10.0.0.10":                     `give an address of a host in the VPC`,
	"doctor --from fd00::1 10.0.0.10":                          `different families`,
	"doctor 10.0.0.10:0":                                       `port from 1 to 65535`,
	"doctor http://10.0.0.10":                                  `give tcp://HOST:PORT or icmp://HOST`,
	"doctor tcp://10.0.0.10":                                   `give tcp://HOST:PORT or icmp://HOST`,
	"explain 172.31.0.10":                                      `2 arg`,
	"explain 172.31.0.10 office":                               `give ADDRESS or ADDRESS:PORT`,
	"explain 172.31.0.10 10.0.0.10:0":                          `port from 1 to 65535`,
	"explain 172.31.0.10 10.0.0.10:70000":                      `give ADDRESS or ADDRESS:PORT`,
	"explain 172.31.0.10 fd00::1":                              `different families`,
	"explain --proto upd 172.31.0.10 10.0.0.10":                `did you mean udp?`,
	"explain --proto -1 172.31.0.10 10.0.0.10":                 `number from 1 to 255`,
	"explain --network 8056 172.31.0.10 10.0.0.10":             `want 16 hex digits`,
	"explain --network 8056c2e21c000002 10.0.0.10 172.31.0.10": `did you mean 8056c2e21c000001?`,
	"doctor --from nonsense":                                   `give an address`,
	// join, leave, moons
	"join":                   `1 arg`,
	"join 8056c2e21c":        `want 16 hex digits`,
	"join 0000000000000000":  `want 16 hex digits`,
	"leave 8056c2e21c000002": `did you mean 8056c2e21c000001?`,
	"leave 1111111111111111": `isn't joined: see ztgate networks`,
	"orbit xyz":              `want its ID`,
	"orbit 1 2":              `seed "2"`,
	"deorbit 8056c2e21c":     `is not orbited`,
	// ping
	"ping -c 0 10.147.17.9":          `from 1 to 1000000`,
	"ping -c -3 10.147.17.9":         `from 1 to 1000000`,
	"ping -c 3 -c 4 10.147.17.9":     `given twice`,
	"ping --timeout 1h 10.147.17.9":  `from 1ms to 25s`,
	"ping --timeout 0 10.147.17.9":   `from 1ms to 25s`,
	"ping --timeout -1s 10.147.17.9": `from 1ms to 25s`,
	"ping --timeout 1us 10.147.17.9": `from 1ms to 25s`,
	"ping --timeout 5 10.147.17.9":   `from 1ms to 25s`,
	"ping -i 0 10.147.17.9":          `from 1ms to 1h0m0s`,
	"ping -i -1s 10.147.17.9":        `from 1ms to 1h0m0s`,
	"ping 10.147.17.9:0":             `port from 1 to 65535`,
	"ping 10.147.17.9:99999":         `port from 1 to 65535`,
	"ping a:b:c":                     `give HOST or HOST:PORT`,
	// wait
	"wait --for raedy":     `did you mean ready?`,
	"wait --for=":          `is empty`,
	"wait --timeout -1s":   `from 1ms to 168h0m0s`,
	"wait --timeout 0":     `from 1ms to 168h0m0s`,
	"wait --timeout 9999h": `from 1ms to 168h0m0s`,
	// doctor
	"doctor http://10.0.0.10/": `give tcp://HOST:PORT`,
	// identities and planets
	"identity new --force":         `--force is for files`,
	"identity new <a> <a>":         `need a file each`,
	"identity show":                `1 arg`,
	"planet make":                  `root`,
	"planet make -o <a> --key <a>": `need a file each`,
	"planet make --id 0":           `above 0`,
	"planet make --id -1":          `invalid`,
	"planet make --root= -o <a>":   `root`,
	// controller
	"controller set fcd8055969000001":                                              `nothing to change`,
	"controller set fcd8055969000001 --mtu 0":                                      `from 1280 to 10000`,
	"controller set fcd8055969000001 --mtu 99999":                                  `from 1280 to 10000`,
	"controller set fcd8055969000001 --rfc4193=false":                              `leave it out`,
	"controller set fcd8055969000001 --name=":                                      `is empty`,
	"controller set 12 --name x":                                                   `want 16 hex digits`,
	"controller create --subnet 10.147.17.5/24":                                    `with room for hosts`,
	"controller create --subnet 10.147.17.0/24 --subnet 10.1.0.0/24":               `given twice`,
	"controller create --pool 10.0.0.9-10.0.0.1":                                   `give FIRST-LAST`,
	"controller create --route 10.0.0.1/24":                                        `give TARGET`,
	"controller create --json-keys x":                                              `--json-keys`,
	"controller create --mtu 0":                                                    `from 1280 to 10000`,
	"controller create --rules /nonexistent":                                       `--rules`,
	"controller authorize fcd8055969000001":                                        `at least 2 arg`,
	"controller authorize fcd8055969000001 xyz":                                    `10 hex digits`,
	"controller authorize fcd8055969000001 0123456789 --ip 10.0.0.300":             `--ip`,
	"controller authorize fcd8055969000001 0123456789 0123456780 --ip 10.147.17.7": `for one member`,
	"controller authorize fcd8055969000001 0123456789 0123456780 --name x":         `for one member`,
	"controller authorize fcd8055969000001 0123456789 --tag 7":                     `--tag`,
	"controller authorize fcd8055969000001 0123456789 --capability -1":             `invalid`,
	"controller authorize fcd8055969000001 0123456789 --timeout 5s":                `is for --wait`,
	"controller authorize fcd8055969000001 0123456789 --wait --timeout 0":          `from 1ms`,
	"controller deauthorize fcd8055969000001 0123456789 --wait":                    `unknown flag`,
	"controller import":                                                            `1 arg`,
	"controller import /nonexistent":                                               `there is no network in it`,
	"controller export":                                                            `1 arg`,
	"controller export <a>":                                                        `has no identity.secret`,
	"controller delete 12":                                                         `want 16 hex digits`,
	"controller members 12":                                                        `want 16 hex digits`,
	"controller member delete fcd8055969000001 xyz":                                `10 hex digits`,
	// run: the settings
	"run extra":                                       `unknown command`,
	"run --port -1":                                   `from 0 to 65535`,
	"run --port 70000":                                `from 0 to 65535`,
	"run --port 1 --port 2":                           `given twice`,
	"run --address 10.0.0.0":                          `looks like a subnet: give an address in it, as in 10.0.0.1/24`,
	"run --address 10.0.0.0/24":                       `is the subnet itself: give an address in it, as in 10.0.0.1/24`,
	"run --address 10.0.0.255/24":                     `broadcast address of 10.0.0.0/24: give another, as in 10.0.0.254/24`,
	"run --address 10.0.0.1/1":                        `a subnet of /1`,
	"run --address 0.0.0.0":                           `can't be an address`,
	"run --address 127.0.0.1":                         `can't be an address`,
	"run --address 224.0.0.5":                         `can't be an address`,
	"run --address fe80::1":                           `can't be an address`,
	"run --address office":                            `give an address`,
	"run --source 10.0.0.5/24":                        `write 10.0.0.0/24`,
	"run --source all":                                `give ADDRESS/BITS`,
	"run --nat-address 172.31.0.0/24":                 `give an address, as in 172.31.0.250, or host`,
	"run --nat-address ::1 --nat-address ::2":         `there are two addresses of one family`,
	"run --mtu 100":                                   `from 1280 to 65535, or 0`,
	"run --mtu -1":                                    `from 1280 to 65535, or 0`,
	"run --nat-address office":                        `give an address, as in 172.31.0.250, or host`,
	"run --exit=maybe":                                `use true or false`,
	"config check --member=maybe":                     `invalid`,
	"run --max-flows 5":                               `from 1024`,
	"run --max-flows 99999999999":                     `from 1024`,
	"run --api-listen 9993":                           `give ADDRESS:PORT`,
	"run --listen 9002":                               `give ADDRESS:PORT`,
	"run --listen 127.0.0.1:99999":                    `give ADDRESS:PORT`,
	"run --listen 127.0.0.1:http":                     `give ADDRESS:PORT`,
	"run --log-level loud":                            `use one of debug`,
	"run --log-format xml":                            `use one of text`,
	"run --node rust":                                 `use one of`,
	"run --network 8056c2e21c000001,8056c2e21c000001": `listed twice`,
	"run --network 12":                                `want 16 hex digits`,
	"run --ingress magic":                             `use tun`,
	"run --tun a/b":                                   `no interface name`,
	"run --interface eth0/1":                          `name of an interface`,
	"run --masquerade=perhaps":                        `use true or false`,
	"run --policy-default maybe":                      `use one of accept`,
	"run --allow tcp:10.0.0.10:0":                     `give a port`,
	"run --allow icmp:10.0.0.10:443":                  `ICMP has no ports`,
	"run --allow foo:10.0.0.10":                       `give PROTO:HOST:PORT`,
	"run --target 10.0.0.10:443":                      `give tcp://HOST:PORT`,
	"run --target tcp://10.0.0.10":                    `give tcp://HOST:PORT`,
	"run --target icmp://10.0.0.10:80":                `host "10.0.0.10:80"`,
	"run --target http://10.0.0.10":                   `give tcp://HOST:PORT`,
	"run --config /nonexistent":                       `/nonexistent`,
	"run --controller=x":                              `use true or false`,
	"member --policy-default drop":                    `unknown flag`,
	"member --network x":                              `want 16 hex digits`,
	"config check /nonexistent":                       `/nonexistent`,
	"config check <a> --config <b>":                   `given twice`,
	"config check <a> <b>":                            `at most 1 arg`,
	"config show --port x":                            `from 0 to 65535`,
	// lab
	"lab --streams 0":                    `from 1 to 128`,
	"lab --streams 100000":               `from 1 to 128`,
	"lab --duration -1s":                 `from 100ms to 1h0m0s`,
	"lab --timeout 0":                    `from 1s to 1h0m0s`,
	"lab --log-level loud":               `use one of debug`,
	"lab --node rust":                    `this program has`,
	"lab --real nobody --zerotier-one x": `give root, office or gateway`,
	"lab --real root":                    `--zerotier-one`,
	"lab --prefix=":                      `is empty`,
	"lab office --address x":             `give an IP address`,
}

// TestInputs: nothing wrong is taken silently, and the right one is named.
func TestInputs(t *testing.T) {
	h := newHarness(t)
	h.serve(t)
	h.populate(t)
	if r := h.run(t, "", "controller", "create", "--name", "office"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	files := strings.NewReplacer("<a>", h.dir+"/a", "<b>", h.dir+"/b")
	for line, want := range inputs {
		t.Run(line, func(t *testing.T) {
			h.ran = nil
			r := h.run(t, "", strings.Fields(files.Replace(line))...)
			if r.code != 2 || r.out != "" || !strings.Contains(r.err, want) {
				t.Errorf("exit code %d, standard output %.200q, want 2 and %q:\n%s", r.code, r.out, want, r.err)
			}
			if h.ran != nil {
				t.Error("it runs")
			}
		})
	}
	if n := len(h.node.Networks()); n != 1 {
		t.Errorf("%d networks are joined now", n)
	}
}

// free are flags that take any text, and switches: nothing is wrong with them.
var free = []string{"json", "help", "home", "socket", "planet", "force", "key", "out", "name", "public", "bridge", "6plane", "rfc4193",
	"keep", "down", "zerotier-one", "no-descriptions"}

// TestInputsComplete: every flag of every command has a wrong value in the table.
func TestInputsComplete(t *testing.T) {
	used := func(path, flag string) bool {
		for line := range inputs {
			if strings.HasPrefix("ztgate "+line, path) && slices.ContainsFunc(strings.Fields(line), func(f string) bool {
				name, _, _ := strings.Cut(f, "=")
				return name == "--"+flag || len(name) == 2 && map[string]string{"-c": "count", "-i": "interval", "-o": "out"}[name] == flag
			}) {
				return true
			}
		}
		return false
	}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		path := strings.Replace(c.CommandPath(), "controller network", "controller", 1)
		path = strings.Replace(path, "controller set", "controller c", 1) // the same flags
		path = strings.Replace(strings.Replace(path, "member list", "members", 1), "controller member a", "controller a", 1)
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if _, setting := f.Value.(settingValue); setting && !strings.HasSuffix(path, " run") {
				return // tried there
			}
			if !slices.Contains(free, f.Name) && !used(path, f.Name) {
				t.Errorf("%s --%s: no wrong value is tried", path, f.Name)
			}
		})
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk((&app{}).command())
}
