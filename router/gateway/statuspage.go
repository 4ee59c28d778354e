package gateway

import (
	"html/template"

	"ztgate/router/control"
)

// statusPage is what a browser shows at /.
var statusPage = template.Must(template.New("status").Funcs(template.FuncMap{"prefixes": control.PrefixList}).Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="10"><title>ztgate {{.Info.Address}}</title>
<style>body{font:15px/1.5 sans-serif;margin:2em auto;max-width:60em;padding:0 1em}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.2em .8em .2em 0;border-bottom:1px solid #ccc;vertical-align:top}</style>
<h1>ztgate {{.Info.Address}}: {{.Health.State}}</h1>
<p>{{.Info.State}}, {{.Info.Mode}}, version {{.Info.Build.Version}}, since {{.Info.Started.UTC.Format "2006-01-02 15:04:05"}} UTC.
Peers: {{.Peers.Direct}} direct, {{.Peers.Relay}} by relay, {{.Peers.None}} silent. {{if .Limit}}Flows: {{.Flows}} of {{.Limit}}.{{end}}</p>
{{with .Health.Reasons}}<h2>What is wrong</h2><ul>{{range .}}<li>{{.}}</li>{{end}}</ul>{{end}}
<h2>Networks</h2><table><tr><th>ID<th>Name<th>Status<th>Addresses<th>Problems</tr>
{{range .Networks}}<tr><td>{{.ID}}<td>{{.Name}}<td>{{.Status}}<td>{{prefixes .Addresses}}<td>{{range .Problems}}{{.}}<br>{{end}}</tr>
{{else}}<tr><td colspan="5">none</tr>{{end}}</table>
{{with .Problems}}<h2>Problems of the configuration</h2><ul>{{range .}}<li>{{.}}</li>{{end}}</ul>{{end}}
{{with .Targets}}<h2>Targets</h2><table><tr><th>Target<th>State<th>Connect time</tr>
{{range .}}<tr><td>{{.Target}}<td>{{if .Up}}up{{else}}down: {{.Error}}{{end}}<td>{{if .Up}}{{.ConnectMS}} ms{{end}}</tr>{{end}}</table>{{end}}
{{with .Names}}<h2>Names</h2><table><tr><th>Name<th>Addresses<th>Last answer<th>Error</tr>
{{range .}}<tr><td>{{.Name}}<td>{{range $i, $a := .Addresses}}{{if $i}}, {{end}}{{$a}}{{end}}<td>{{if not .LastAnswer.IsZero}}{{.LastAnswer.UTC.Format "2006-01-02 15:04:05"}} UTC{{end}}<td>{{.Error}}</tr>{{end}}</table>{{end}}
<p><a href="/metrics">metrics</a> <a href="/readyz">readiness</a></p></html>
`))
