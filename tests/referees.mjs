// Two programs that we did not write, for tests/test_convert.py: llama.cpp, and Go's text/template, which Ollama uses.
// One JSON request on stdin, one JSON answer on stdout. MINIMIND_NODE is the folder where npm installed them.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const modules = path.join(process.env.MINIMIND_NODE, "node_modules");
const load = (file) => import(pathToFileURL(path.join(modules, file)));
const request = JSON.parse(fs.readFileSync(0, "utf-8"));
const answer = {models: []};

if (request.models) {
    const {getLlama} = await load("node-llama-cpp/dist/index.js");
    const {Template} = await load("@huggingface/jinja/dist/index.js");  // in which node-llama-cpp reads templates
    const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
    for (const {path, texts, prompts, length} of request.models) {
        const model = await llama.loadModel({modelPath: path, useMmap: false});
        const {general, tokenizer} = model.fileInfo.metadata;
        const said = {architecture: general.architecture, template: tokenizer.chat_template, end: model.isEogToken(2),
            plain: texts.map((text) => model.tokenize(text)), marked: texts.map((text) => model.tokenize(text, true)),
            shown: texts.map((text) => model.detokenize(model.tokenize(text, true))), continued: [], probabilities: [],
            rendered: (request.chats ?? []).map((chat) => new Template(tokenizer.chat_template).render(chat))};
        const context = await model.createContext({contextSize: 512, threads: 1, flashAttention: false,
            experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
        for (const prompt of prompts) {
            const sequence = context.getSequence();
            const ids = [];
            for await (const {token, probabilities} of
                sequence.evaluateWithMetadata(prompt, {probabilities: true}, {temperature: 0, yieldEogToken: true})) {
                if (!ids.length)
                    said.probabilities.push(Object.fromEntries([...probabilities].slice(0, 50)));
                ids.push(token);
                if (ids.length === length)
                    break;
            }
            said.continued.push(ids);
            sequence.dispose();
        }
        answer.models.push(said);
        await model.dispose();
    }
}

if (request.template) {
    const {parse} = await load("@evertdespiegeleer/go-template/dist/main.js");
    answer.rendered = await Promise.all(request.values.map((value) => parse(request.template, value)));
}

process.stdout.write(JSON.stringify(answer), () => process.exit(0));
